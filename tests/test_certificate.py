"""What the certificate says is decided by what it should be: planted by hand, a criterion, check or interval at a time."""
import copy

import numpy as np
import pytest
from scipy import stats

import synthetic
from nanochat_cl import crossover, curves, estimates
from nanochat_cl.command import UserError
from synthetic import CLAIM, CROSS, RATES, claimed

CL = CROSS["cl", "default"]
exact = lambda *mean: estimates.Estimate(np.array(mean, float), np.zeros(len(mean)), np.zeros(len(mean)))
around = lambda mean, half: estimates.Estimate(np.array([mean]), np.array([half]), np.array([half]))


def test_the_band_over_documents_holds_all_milestones_at_once():
    e = estimates.over_documents(np.zeros(9), np.random.default_rng(0).normal(size=(4000, 9)))
    np.testing.assert_allclose(e.half, stats.norm.ppf(0.975), rtol=0.08)
    np.testing.assert_allclose(e.band, stats.norm.ppf((1 + 0.95 ** (1 / 9)) / 2), rtol=0.08)


def test_of_two_documents_one_is_drawn_and_one_alone_is_kept():
    weights = estimates.resample(np.array([0, 0, 1, 2, 2, 2]), np.random.default_rng(0), 400)
    assert {tuple(w) for w in weights[:, :2]} == {(0, 1), (1, 0)} and (weights[:, 2] == 1).all() and (weights[:, 3:].sum(1) == 2).all()


@pytest.mark.parametrize("part,split", [(part, split) for part in ("domain", "general") for split in ("val", "test")])
def test_every_panel_of_every_record_is_compared(part, split):
    rows = synthetic.records(milestones=4)
    found = rows[5][part][split]                                        # cl at milestone 1
    (found["subdomains"]["numpy"] if part == "domain" else found)["docs"][0][1] += 1
    with pytest.raises(UserError, match="cl/default seed 42 was scored on other documents"):
        curves.paired(rows)


def test_milestones_of_other_tokens_are_refused():
    rows = synthetic.records(milestones=4)
    for r in rows:
        r["tokens"] *= 1 + (r["arm"] == "cl")
    with pytest.raises(UserError, match="milestones must agree"):
        curves.paired(rows)


def test_a_lost_trial_is_known_by_its_ends_on_val_for_the_other_seeds(tmp_path):
    folders, ends, trial = [], {}, {"arm": "dense", "recipe": "lr_mult=0.5", "lr_mult": 0.5, "seed": 2}
    for seed in (1, 2, 3):
        rows = synthetic.records({key: CROSS[key] for key in RATES}, seeds=(seed,), milestones=4, docs=2)
        ends |= {seed: r["domain"]["val"]["bpb"] for r in rows if r["recipe"] == "lr_mult=0.5" and r["final"] and seed != 2}
        stopped = {"stopped": trial} if seed == 2 else {}
        folders.append(synthetic.write(tmp_path / str(seed), [r for r in rows if seed != 2 or r["milestone"] < 3], **stopped))
    assert curves.stopped_trials(folders) == [trial | {"ended": ends}] and {*ends} == {1, 3}


def test_the_line_is_chosen_on_val():
    """On test alone another pair of ends would have lost less."""
    arms = {("dense", "lr_mult=2.0"): (2.0, lambda t: 0.0, .4), ("dense", "lr_mult=1.5"): (1.5, lambda t: -.1 * t, .2),
            ("dense", "lr_mult=0.5"): (.5, lambda t: -.2 * t, .3), ("cl", "default"): (1.0, lambda t: -0.05 * t, .35)}
    rows = synthetic.records(arms, seeds=(1, 2, 3), sd=0.0)
    for r in rows:
        if r["recipe"] == "lr_mult=0.5" and r["milestone"] == 8:
            r["general"]["test"]["bpb"] -= 0.6
            for doc in r["general"]["test"]["docs"]:
                doc[0] -= 0.6 * doc[1] * np.log(2)
    assert crossover.assess(rows)["floor_at_equal_domain"]["between"] == ["dense/lr_mult=1.5", "dense/lr_mult=2.0"]


def test_model_cl_is_chosen_on_val_at_the_end():
    val, test = np.zeros((2, 3, 4)), np.zeros((2, 3, 4))
    val[0, :, 3], val[1, :, 1], test[1] = 1, 9, 5                       # 0 is best on val at the end, 1 earlier and on test
    x = crossover.compare(val[:1], test[:1], test[:1], val, test, test)
    assert x["cl_at"].tolist() == [0] and (x["d"] == 0).all()


def test_no_limit_beyond_four_epochs():
    for past in (None, "cl"):                                           # all runs, or Model-CL's alone
        v = claimed(harm=lambda r: r.update(epoch=r["milestone"] * 4.5 / 8) if past in (None, r["arm"]) else None)
        assert v["checks"]["unique text"] == dict(state="fail", found="4.50 epochs of it (at most 4)")
        assert v["verdict"] == "PARTLY" and v["missing"] == ["unique text"] and v["parts"]["limit"]["state"] == "barred"
        assert v["dense_limit"]["milestone"] == (7 if past is None else 8)


def test_forgetting_is_compared_to_the_dense_run_of_the_end():
    val, general = np.zeros((2, 3, 4)), np.zeros((2, 3, 4))
    val[0, :, 1], val[1, :, 3] = 9, 1                                   # recipe 0 holds the limit, 1 is best at the end
    general[0, :, 3], general[1, :, 3] = -1, -5
    x = crossover.compare(val, val, general, val[:1], val[:1], general[:1] * 0 - np.arange(4) * 0.5)
    assert x["limit_at"].tolist() == [0, 1] and x["floor"].ravel().tolist() == [1.5 - 5] * 3


def test_the_criteria_by_hand():
    of = lambda d, beyond=exact(.02), floor=exact(0), trend=exact(0): crossover.criteria(d, beyond, floor, trend)
    start = lambda mean, half: estimates.Estimate(np.array([mean, 1, 1, 1]), np.array([half, 0, 0, 0]), np.array([half, 0, 0, 0]))
    gaps = [of(start(m, h))["gap"] for m, h in ((-.01, .005), (-.01, .02), (-.001, .0015), (.1, .2), (.02, .01))]
    assert gaps == [1, 0, -1, 0, -1], "a gap below the smallest effect is none"
    end = lambda mean, half, band: estimates.Estimate(np.array([-1, -1, -1, mean]), np.array([0, 0, 0, half]), np.array([0, 0, 0, band]))
    assert [of(end(m, .002, .004))["crossing"] for m in (-.003, -.001, .001, .003)] == [-1, 0, 0, 0]
    assert [of(exact(-1, 1), around(m, h))["limit"] for m, h in ((.01, .02), (.01, .005), (.004, .001), (.004, .0005))] == [0, 1, 0, -1]
    d = estimates.Estimate(np.array([-1., 1, 1, 1, 1]), np.zeros(5), np.array([0, 0, 0, 0, 2.]))
    assert of(d)["crossing"] == 0 and not of(d)["ahead"], "the band at the end is not above 0"
    assert of(exact(-1, 1, 1, 1, -1, 1))["crossing"] == 0, "a lead that was lost counts no milestones"
    closing = lambda last, mean, half: bool(of(exact(-1, last), trend=around(mean, half))["rising"])
    assert [closing(*x) for x in ((-.05, .1, .02), (-.05, .1, .2), (-.2, .1, .02), (.05, .1, .02))] == [True, False, False, False]


def test_the_trend_is_per_length_of_the_run_and_of_its_second_half():
    x = np.concatenate([np.full(4, 7.0), 0.01 * np.arange(5)])
    assert crossover.slope(x) == pytest.approx(0.01 * 8) and crossover.slope(np.ones((2, 1))).tolist() == [[0], [0]]


@pytest.mark.parametrize("check", sorted(crossover.REFUSAL_NEEDS - {"tokens"}))
def test_a_refusal_needs(check):
    parts = dict(gap=1, crossing=-1, limit=-1, floor=1, ahead=False, rising=False)
    assert crossover.verdict(parts, 3, [check])[0] == "INCONCLUSIVE" and crossover.verdict(parts, 3, [])[0] == "NOT SUPPORTED"


def test_an_unfinished_run_refuses_nothing():
    below = {("dense", r): CROSS["dense", r] for _, r in RATES} | {
        ("cl", r): (CROSS["dense", r][0], lambda t, of=CROSS["dense", r][1]: -0.08 + of(t), 0.2) for _, r in RATES}
    assert claimed(below, final=False)["verdict"] == "INCONCLUSIVE" and claimed(below)["verdict"] == "NOT SUPPORTED"


@pytest.mark.parametrize("check", ["cool-down", "unique text"])
def test_a_limit_needs(check):
    parts = dict(gap=1, crossing=1, limit=1, floor=1, ahead=True, rising=False)
    assert "beyond the dense limit" not in crossover.verdict(parts, 3, [check])[1] and crossover.barred({check}) == {"limit"}


def moved(r, by, parts=("numpy", "torch", "pandas", "scipy", "django", "sympy", "flask", "attrs")):
    """Document i of every sub-domain costs by(i) bits per byte more, on test."""
    for name in parts:
        for i, doc in enumerate(r["domain"]["test"]["subdomains"][name]["docs"]):
            doc[0] += by(i) * doc[1] * np.log(2)


def test_a_lead_that_other_documents_may_not_show_is_no_crossing():
    """All seeds agree, for the documents are the same: half of them favour Model-CL by far, the other half dense."""
    v = claimed(harm=lambda r: moved(r, lambda i: -0.2 * (-1) ** i) if r["arm"] == "cl" else None)
    documents = v["checks"]["documents"]
    assert documents["state"] == "fail" and v["missing"] == ["documents"] and v["verdict"] == "INCONCLUSIVE", (documents, v["sentence"])


def test_an_interval_over_documents_is_that_of_the_runs_it_compares():
    """Documents that count for nothing at a milestone, or in a run that is not compared there, widen nothing."""
    early, late = ("dense", "default"), ("dense", "lr_mult=0.5")
    arms = {early: (1.0, lambda t: -.2 * t, .25), late: (.5, lambda t: .2 * t - .05, .2), ("cl", "default"): CL}
    noisy = lambda r: moved(r, lambda i: (-1) ** i) if (r["arm"], r["recipe"]) == late and r["milestone"] < 8 else None
    def assess(harm):
        rows = synthetic.records(arms)
        for r in rows:
            harm(r)
        return crossover.assess(rows)
    quiet, loud = assess(lambda r: None), assess(noisy)
    assert quiet["curves"]["dense_run"] == loud["curves"]["dense_run"] and {*quiet["curves"]["dense_run"]} == {"dense/default", "dense/lr_mult=0.5"}
    for m, run in enumerate(quiet["curves"]["dense_run"]):
        same = run == "dense/default" or m == 8
        assert (quiet["curves"]["d_low"][m] == pytest.approx(loud["curves"]["d_low"][m])) == same, m
    assert quiet["parts"]["floor"]["high"] - quiet["parts"]["floor"]["low"] < 0.05
    assert quiet["parts"]["floor"]["low"] < quiet["parts"]["floor"]["estimate"] < quiet["parts"]["floor"]["high"]


def test_the_limits_interval_is_that_of_its_milestone():
    def assess(by):
        rows = synthetic.records({("dense", "default"): (1.0, lambda t: 0.3 * (t == 0.875), .25), ("cl", "default"): CL})
        for r in rows:
            if r["arm"] == "dense" and r["milestone"] == 8:
                moved(r, by)
        return crossover.assess(rows)
    quiet, loud = assess(lambda i: 0), assess(lambda i: (-1) ** i)
    assert quiet["dense_limit"]["milestone"] == 7
    assert loud["parts"]["limit"]["low"] == pytest.approx(quiet["parts"]["limit"]["low"])
    assert loud["parts"]["crossing"]["low"] < quiet["parts"]["crossing"]["low"] - 0.1


def test_the_other_arms_are_not_model_cl():
    """An ablation beside it is better, and was tried on more rates: it is another trial, and nothing of cl's."""
    v = claimed(CROSS | {("cl-noiso", "default"): (1.0, lambda t: 0.3, 0.0)})
    assert v["cl"] == "cl/default" and v["arm"] == "cl" and v["verdict"] == "SUPPORTED"
    assert v["curves"]["cl_bpb"] == claimed()["curves"]["cl_bpb"]


def test_the_limit_is_measured_on_test_and_bands_are_wider():
    rows = synthetic.records(CROSS, **CLAIM)
    v, c = crossover.assess(rows), curves.paired(rows)
    run, m = c.names.index(v["dense_limit"]["run"]), v["dense_limit"]["milestone"]
    assert v["dense_limit"]["bpb"] == pytest.approx(-c.test[run, :, m].mean(), abs=1e-12) != pytest.approx(-c.val[run, :, m].mean(), abs=1e-12)
    low, high, d_low, d_high = (np.array(v["curves"][key]) for key in ("band_low", "band_high", "d_low", "d_high"))
    assert (low < d_low).all() and (high > d_high).all()


def test_a_line_needs_ends_that_differ():
    bracket = lambda *score: crossover.bracket(np.array(score), np.array([0.1, 0.2]), -1.0)
    assert bracket(-1.0, -0.997) is None and bracket(-1.0, -0.99) == (0, 1) and bracket(-1.01, -1.0) is None


def test_what_a_claim_needs_it_needs_of_every_record():
    for where in (lambda r: r["arm"] == "dense", lambda r: r["seed"] == 3, lambda r: r["milestone"] == 4):
        v = claimed(harm=lambda r: r.update(confirmatory=not where(r)))
        assert v["missing"] == ["confirmatory data"] and v["verdict"] == "PARTLY" and not v["confirmatory"]
    assert claimed(harm=lambda r: r.update(profile="cpu" if r["seed"] == 3 else "gpu1"))["missing"] == ["confirmatory data"]
    for where in (lambda r: r["arm"] == "dense-rows", lambda r: r["seed"] == 3):
        v = claimed(harm=lambda r: r.update(final=r["final"] and not where(r)))
        assert v["missing"] == ["finished runs"] and v["verdict"] == "PARTLY"


def test_the_median_record_is_idle_over_all_seeds():
    for where in (lambda r: r["milestone"] > 1, lambda r: r["seed"] > 1):
        v = claimed(harm=lambda r: r["blocks"] and r["blocks"].update(idle_share=0.05 if where(r) else 0.9))
        assert v["missing"] == ["exercised isolation"] and "5%" in v["checks"]["exercised isolation"]["found"]
    v = claimed(harm=lambda r: r["blocks"] and r["blocks"].update(idle_share=0.05 if r["milestone"] == 8 else 0.9))
    assert v["verdict"] == "SUPPORTED"


def test_before_the_first_step_nothing_is_idle():
    v = claimed(harm=lambda r: r.update(blocks=None) if r["milestone"] == 0 else None)
    assert v["checks"]["exercised isolation"]["state"] == "pass" and v["verdict"] == "SUPPORTED"


@pytest.mark.parametrize("arm", ["dense", "cl"])
def test_both_runs_have_cooled_down(arm):
    v = claimed(harm=lambda r: r.update(lr_mult=max(r["lr_mult"], 0.5)) if r["arm"] == arm else None)
    assert v["missing"] == ["cool-down"] and v["verdict"] == "PARTLY" and v["parts"]["limit"]["state"] == "barred"


def test_as_many_trials_are_enough():
    v = claimed(CROSS | {("cl", f"lr_mult={lr}"): CL for lr in (0.1, 0.5, 2.0, 3.0)})
    assert v["checks"]["equal trials"] == dict(state="pass", found="5 dense, 5 other (arms x recipes; no more than dense)") and v["verdict"] == "SUPPORTED"


def test_a_phase_a_that_one_arm_shares_is_one():
    rows, first = synthetic.records(CROSS, **CLAIM), {}
    for r in rows:
        if r["arm"] == "cl" and r["milestone"] == 0:
            r.update({part: copy.deepcopy(first.setdefault("cl", r)[part]) for part in ("domain", "general")})
    v = crossover.assess(rows)
    assert v["checks"]["seeds"]["found"].startswith("1 with a Phase A of their own, of 3 ") and v["verdict"] == "INCONCLUSIVE"


@pytest.mark.parametrize("factor,matched", [(1.009, True), (0.991, True), (1.02, False), (0.98, False)])
def test_matched_is_to_one_percent(factor, matched):
    v = claimed(harm=lambda r: r.update(params_total=1e6 * (factor if r["arm"] == "cl" else 1)))
    assert (v["matched"], v["checks"]["matched"]["state"]) == ((["total parameters"], "pass") if matched else ([], "fail"))


def test_a_trial_is_compared_on_the_seeds_for_which_it_ended():
    """Seed 2 is easy: who ended on it alone looks ahead of a mean over all, and is not."""
    def easy(r):
        if r["seed"] == 2:
            r["domain"]["val"]["bpb"] -= 0.5
    trial = {"arm": "dense", "recipe": "lr_mult=1.5", "lr_mult": 1.5, "seed": 1}
    end = {r["seed"]: r["domain"]["val"]["bpb"] for r in synthetic.records(CROSS, **CLAIM)
           if (r["arm"], r["recipe"]) == ("dense", "default") and r["final"]}
    v = claimed(harm=easy, gone=[trial | {"ended": {2: end[2] - 0.5 + 0.1}}])
    assert v["checks"]["stopped trials"]["state"] == "pass" and v["verdict"] == "SUPPORTED"
    v = claimed(harm=easy, gone=[trial | {"ended": {2: end[2] - 0.5 - 0.1}}])
    assert v["checks"]["stopped trials"]["state"] == "fail"
    assert claimed(gone=[trial | {"ended": {7: 0.5}}])["checks"]["stopped trials"]["state"] == "pass", "of another seed nothing is known"


def test_a_refusal_of_who_is_ahead_needs_its_best_rate_too():
    """Ahead from the start, by less than the smallest effect, at the one rate it was given: a better rate may pass the limit."""
    small = {key: (lr, (lambda t: 0.002) if key[0] == "cl" else gain, lost) for key, (lr, gain, lost) in CROSS.items()}
    v = claimed(small, seeds=range(1, 9), sd=0.0002, docs=60)
    assert v["checks"]["interior optimum of Model-CL"]["state"] == "fail"
    assert v["verdict"] == "INCONCLUSIVE", v["sentence"]


def test_the_crossing_point_lies_where_the_mean_crosses_between_two_milestones():
    """d = -0.035 + 0.08 t, 0 at t = 7/16: half way from milestone 3 to 4."""
    v = claimed(CROSS | {("cl", "default"): (1.0, lambda t: -0.035 + 0.08 * t, 0.15)}, sd=0.0, docs=60)
    assert v["crossing_between"] == v["tokens"][3:5] and v["crossing_tokens"] == pytest.approx(7 / 16 * 1_048_576, rel=0.03)


def test_the_limit_has_an_optimum_inside_its_grid_as_well_as_the_dense_run_of_the_end():
    """At the end a rate in the middle is best; the limit lies just before it, under another schedule that was tried at one rate only."""
    v = claimed(CROSS | {("dense", "lr_schedule=linear"): (1.0, lambda t: 0.2 * (t == 0.875) - 0.02 * t, 0.25)})
    assert v["dense_limit"]["run"] == "dense/lr_schedule=linear" and v["curves"]["dense_run"][-1] == "dense/default"
    assert v["checks"]["interior dense optimum"]["state"] == "fail" and "interior dense optimum" in v["missing"] and v["verdict"] == "INCONCLUSIVE"
