"""
The certificate on simulated curves whose truth is known: what is false passes in at most 5 % of the runs, what is true is found.
The table for all numbers of seeds is runs/results/simulations.md, made by `python runs/simulations.py`.
"""
import sys

import numpy as np
import pytest

from nanochat_cl import crossover, estimates, upstream

sys.path.insert(0, str(upstream.REPO / "runs"))
import simulations  # noqa: E402  a script, not a package

SIMS = 1000
NOISE = 3 * np.sqrt(0.05 * 0.95 / SIMS)     # three s.d. of a binomial rate of 5 %
FALSE = [f for f in simulations.FAMILIES if f.false]
TRUE = [f for f in simulations.FAMILIES if not f.false]


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("memory", [0.0, 0.8, 0.99])
def test_simultaneous_band_covers_the_whole_curve_in_95_of_100_runs(seeds, memory):
    z = np.random.default_rng(seeds).normal(size=(10_000, seeds, 9))
    for m in range(1, 9):
        z[..., m] = memory * z[..., m - 1] + np.sqrt(1 - memory**2) * z[..., m]
    e = estimates.over_seeds(z)
    covered = ((e.band_low <= 0) & (e.band_high >= 0)).all(-1).mean()
    assert covered >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 10_000), covered


@pytest.mark.parametrize("family", FALSE, ids=lambda f: f.name)
@pytest.mark.parametrize("sd", [0.001, 0.003])
def test_what_is_false_passes_in_at_most_5_of_100_runs(family, sd):
    for seeds in (2, 3, 5, 10):
        got = simulations.rates(family, seeds, sd, SIMS)
        assert got[family.false] <= 0.05 + NOISE and got["SUPPORTED"] + got["DOMINATES"] <= 0.05 + NOISE, (seeds, got)
        if family.false == "crossing":
            assert got["PARTLY"] <= 0.05 + NOISE, (seeds, got)


def test_an_end_exactly_at_the_limit_is_not_beyond_it_even_without_the_smallest_effect():
    family = next(f for f in FALSE if f.false == "limit")
    for seeds in (3, 5, 10):
        x = crossover.compare(**simulations.simulate(family, SIMS, seeds, np.random.default_rng(seeds), 0.003))
        assert (estimates.over_seeds(x["beyond"]).low > 0).mean() <= 0.05 + NOISE, seeds


@pytest.mark.parametrize("family", TRUE, ids=lambda f: f.name)
def test_power_grows_with_seeds_and_a_true_crossing_is_found_with_ten(family):
    rates = [simulations.rates(family, seeds, 0.001, SIMS)["SUPPORTED"] for seeds in (2, 3, 5, 10)]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] >= 0.95, rates


def test_a_lasting_deficit_is_called_not_supported():
    parallel = next(f for f in FALSE if "parallel" in f.name)
    assert simulations.rates(parallel, 5, 0.001, SIMS)["NOT SUPPORTED"] >= 0.90


def test_nothing_is_claimed_when_eight_trials_stand_against_one():
    for family in (next(f for f in FALSE if f.recipes == (8, 1)), simulations.Family("truly crossing", "", simulations.CROSSES, (8, 1))):
        got = simulations.rates(family, 10, 0.003, SIMS)
        assert got["SUPPORTED"] == got["PARTLY"] == got["DOMINATES"] == 0, family.name
    assert got["crossing"] > 0.9, "what is not claimed is there"


def test_a_start_above_that_stays_above_dominates_and_does_not_cross():
    got = simulations.rates(simulations.Family("above", "crossing", (0.02,) * 5), 8, 0.001, SIMS)
    assert got["DOMINATES"] >= 0.95 and got["SUPPORTED"] == 0, got


def test_the_table_says_how_it_was_made():
    text = simulations.power_table(50, seed_counts=(3,), sds=(0.001,))
    assert "python runs/simulations.py --sims 50" in text
    assert all(text.count(f"| {f.name} |") in (2, 3) for f in simulations.FAMILIES)


def test_the_committed_table_is_of_these_families_and_this_command():
    text = (upstream.REPO / "runs/results/simulations.md").read_text()
    assert "    python runs/simulations.py --sims 2000 > runs/results/simulations.md\n" in text
    assert all(text.count(f"| {f.name} |") >= 4 for f in simulations.FAMILIES)


def test_looks_add_up_where_seeds_are_added_on_request():
    family = next(f for f in FALSE if f.false == "floor")
    said = simulations.rates_of_growing(family, 0.001, SIMS)
    assert len(said) == 8 and said == sorted(said) and said[0] <= 0.05 + NOISE and said[-1] > 2 * said[0], said
