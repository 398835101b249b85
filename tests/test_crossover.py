import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import synthetic
from nanochat_cl import crossover, curves, estimates, files
from nanochat_cl.command import UserError
from synthetic import CLAIM, CROSS, RATES


def flat(value):
    """An Estimate of constant numbers, exact."""
    return estimates.Estimate(np.asarray(value, float), np.zeros(len(value)), np.zeros(len(value)))


# --- intervals against independent oracles

@pytest.mark.parametrize("df", [1, 2, 3, 7, 10, 11, 16, 29, 200])
def test_t_quantile_is_scipys(df):
    assert estimates.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-6)


def test_seed_interval_is_scipys():
    x = np.random.default_rng(0).normal(size=(5, 9))
    e, got = estimates.over_seeds(x), stats.ttest_1samp(x, 0).confidence_interval(0.95)
    np.testing.assert_allclose(e.low, got.low, rtol=1e-6)
    np.testing.assert_allclose(e.high, got.high, rtol=1e-6)


@pytest.mark.parametrize("seeds,milestones", [(2, 9), (3, 9), (5, 9), (8, 20), (3, 1)])
def test_the_band_is_sidaks_closed_form_and_covers_all_independent_milestones_in_95_percent(seeds, milestones):
    exact = stats.t.ppf((1 + 0.95 ** (1 / milestones)) / 2, seeds - 1)
    e = estimates.over_seeds(np.random.default_rng(1).normal(size=(4000, seeds, milestones)))
    np.testing.assert_allclose(e.band / e.half, exact / stats.t.ppf(0.975, seeds - 1), rtol=1e-6)
    assert np.mean((np.abs(e.mean) <= e.band).all(-1)) == pytest.approx(0.95, abs=0.015)


def test_short_names_leave_out_what_all_runs_have_in_common():
    runs = [("dense", "lr_schedule=wsd,plasticity=all"), ("dense", "lr_mult=0.3,lr_schedule=wsd,plasticity=all"), ("cl", "lr_schedule=wsd")]
    assert curves.labels(runs) == ["dense/plasticity=all", "dense/lr_mult=0.3,plasticity=all", "cl"]
    assert curves.labels([("dense", "default"), ("cl", "default")]) == ["dense", "cl"]
    runs = [("dense", "plasticity=budget:0.25"), ("dense-frozen", "plasticity=frozen-shared"), ("dense-low-lr", "lr_mult=0.1,plasticity=budget:0.25")]
    assert curves.labels(runs) == ["dense", "dense-frozen", "dense-low-lr/lr_mult=0.1"], "what an arm's name says is not said again"


def test_bpb_of_the_documents_is_the_bpb_of_the_records():
    rows = synthetic.records()
    c = curves.paired(rows)
    stored = c.stack(lambda r: -r["domain"]["test"]["bpb"])
    np.testing.assert_allclose(c.test, stored, rtol=1e-12)
    np.testing.assert_allclose(c.general, c.stack(lambda r: -r["general"]["test"]["bpb"]), rtol=1e-12)


def test_document_interval_covers_the_truth_of_the_population():
    r, owner, hits = np.random.default_rng(3), np.repeat([0, 1, 2, 3], 6), 0
    size = np.full(24, 1000.0)
    for _ in range(400):
        nats = r.normal(0.1, 1, 24) * 1000 * np.log(2)
        point = curves.scores(nats[None], size, owner)
        e = estimates.over_documents(point, curves.scores(nats[None], size, owner, estimates.resample(owner, r, 300)))
        hits += bool(e.low[0] <= -0.1 <= e.high[0])
    assert 0.90 <= hits / 400 <= 0.985, hits / 400


# --- the rule

def test_crossing_needs_three_milestones_running_and_the_end():
    parts = lambda d: crossover.criteria(flat(d), flat([0.02]), flat([0]), flat([0]))
    assert parts([-1, -1, 1, 1, 1])["crossing"] == 1
    assert parts([-1, -1, -1, 1, 1])["crossing"] == 0
    assert parts([-1, 1, 1, 1, -1])["crossing"] == -1
    assert parts([1, 1, 1, 1, 1])["crossing"] == 0 and parts([1, 1, 1, 1, 1])["ahead"]


def test_an_effect_below_the_smallest_of_interest_is_not_beyond_the_limit():
    parts = lambda x: int(crossover.criteria(flat([-1, 0, 1]), flat([x]), flat([0]), flat([0]))["limit"])
    assert [parts(x) for x in (-0.01, 0.004, 0.006)] == [-1, -1, 1]


@pytest.mark.parametrize("gap,crossing,limit,floor,failed,seeds,expected", [
    (1, 1, 1, 1, [], 3, "SUPPORTED"),
    (1, 1, 1, 1, [], 2, "PARTLY"),
    (1, 1, 1, 1, [], 1, "INCONCLUSIVE"),
    (1, 1, 1, 1, ["confirmatory data"], 3, "PARTLY"),
    (1, 1, 1, 1, ["exercised isolation"], 3, "PARTLY"),
    *((1, 1, 1, 1, [check], 3, "INCONCLUSIVE") for check in (
        "equal trials", "stopped trials", "controls", "same recipe", "same Phase A", "same setting", "documents", "interior dense optimum")),
    (1, 1, 1, 1, ["matched"], 3, "PARTLY"),
    (1, 1, 1, 1, ["cool-down"], 3, "PARTLY"),
    (1, 1, 1, -1, [], 3, "PARTLY"),
    (1, 1, 0, 1, [], 3, "PARTLY"),
    (-1, 0, 1, 1, [], 3, "DOMINATES"),
    (-1, 0, 1, 1, ["confirmatory data"], 3, "INCONCLUSIVE"),
    (-1, 0, 1, -1, [], 3, "INCONCLUSIVE"),
    (1, -1, -1, 1, ["cool-down"], 3, "INCONCLUSIVE"),
    (1, -1, -1, 1, ["routed tokens"], 3, "INCONCLUSIVE"),
    *((1, -1, -1, 1, [check], 3, "INCONCLUSIVE") for check in ("same Phase A", "same setting", "interior optimum of Model-CL")),
    (1, -1, -1, 1, ["controls", "same recipe"], 3, "NOT SUPPORTED"),
    (1, -1, -1, 1, [], 3, "NOT SUPPORTED"),
    (1, -1, -1, 1, ["exercised isolation"], 3, "INCONCLUSIVE"),
    (1, -1, -1, 1, ["interior dense optimum", "confirmatory data"], 3, "NOT SUPPORTED"),
    (1, -1, -1, 1, [], 1, "INCONCLUSIVE"),
    (1, -1, -1, 1, [], 2, "INCONCLUSIVE"),
    (1, 0, 0, 1, [], 3, "INCONCLUSIVE"),
    (1, 0, -1, 1, [], 3, "NOT SUPPORTED"),
])
def test_verdict(gap, crossing, limit, floor, failed, seeds, expected):
    parts = dict(gap=gap, crossing=crossing, limit=limit, floor=floor, ahead=crossing > 0 or gap < 0, rising=False)
    word, holds, missing = crossover.verdict(parts, seeds, failed)
    assert word == expected
    assert set(failed) <= set(missing) and ("seeds" in missing or seeds >= 3)
    if {"interior dense optimum", "cool-down"} & {*failed}:
        assert "beyond the dense limit" not in holds


def test_who_is_ahead_needs_no_better_rate():
    for gap, word in ((1, "SUPPORTED"), (-1, "DOMINATES")):
        parts = dict(gap=gap, crossing=int(gap > 0), limit=1, floor=1, ahead=True, rising=False)
        assert crossover.verdict(parts, 3, ["interior optimum of Model-CL"])[::2] == (word, [])


def test_a_gap_that_still_closes_asks_for_tokens_instead_of_refusing_the_hypothesis():
    parts = dict(gap=1, crossing=-1, limit=-1, floor=1, ahead=False, rising=True)
    assert crossover.verdict(parts, 5)[::2] == ("INCONCLUSIVE", ["tokens"])


def test_recipes_are_chosen_on_val_and_measured_on_test():
    val, test = np.zeros((2, 3, 4)), np.zeros((2, 3, 4))
    val[0, :, :2], val[1, :, 2:] = 1, 2                                # recipe 0 is best early, recipe 1 late, by val
    test[0], test[1] = 10, 20
    val[1, :, 3] = 5
    x = crossover.compare(val, test, test, val[:1], test[:1] + 7, test[:1])
    assert x["dense_at"].tolist() == [0, 0, 1, 1] and x["limit_at"].tolist() == [1, 3]
    assert x["d"][0].tolist() == [7, 7, -3, -3] and x["beyond"][0, 0] == -3
    only_early = np.array([[True, True, False, False]] * 2)            # later milestones are beyond four epochs
    assert crossover.compare(val, test, test, val[:1], test[:1], test[:1], only_early)["limit_at"].tolist() == [0, 0]


# --- records to certificate

def test_a_true_crossing_with_every_check_passed_is_supported():
    v = crossover.assess(synthetic.records(CROSS, **CLAIM))
    assert v["verdict"] == "SUPPORTED" and v["confirmatory"] and v["missing"] == [], v["sentence"]
    assert v["crossing_between"][0] <= v["crossing_tokens"] <= v["crossing_between"][1]
    assert v["crossing_tokens"] == pytest.approx(3 / 8 * 1_048_576, rel=0.15)
    assert v["dense_limit"]["run"] == "dense/default" and v["over"] == "3 seeds"


@pytest.mark.parametrize("change,check", [(dict(profile="cpu"), "confirmatory data"), (dict(final=False), "finished runs"),
                                          (dict(confirmatory=False), "confirmatory data"), (dict(cooled=False), "cool-down"),
                                          (dict(idle=0.05), "exercised isolation")])
def test_a_claim_without_its_conditions_is_not_supported(change, check):
    v = crossover.assess(synthetic.records(CROSS, **CLAIM | change))
    assert v["verdict"] == "PARTLY" and v["missing"] == [check] and f"still needed: {check}." in v["sentence"], v["sentence"]
    assert check != "exercised isolation" or ("isolation was not exercised" in v["checks"][check]["found"] and not v["confirmatory"])


def test_one_seed_never_decides_and_says_what_its_interval_covers():
    for gap, word in ((lambda t: -0.03 + 0.08 * t, "passes the dense curve"), (lambda t: -0.08, "no crossing observed")):
        v = crossover.assess(synthetic.records(gap=gap))
        assert v["verdict"] == "INCONCLUSIVE" and v["holds"] == [] and "seeds" in v["missing"]
        assert word in v["sentence"] and "documents of one seed" in v["sentence"], v["sentence"]
    assert v["censored_after_tokens"] == 1_048_576 and v["crossing_tokens"] is None
    assert {"interior dense optimum", "confirmatory data", "cool-down"} <= set(v["missing"])


def test_three_exploratory_seeds_below_are_not_supported():
    below = {("dense", recipe): CROSS["dense", recipe] for _, recipe in RATES} | {
        ("cl", recipe): (CROSS["dense", recipe][0], lambda t, recipe=recipe: -0.08 + CROSS["dense", recipe][1](t), 0.2) for _, recipe in RATES}
    v = crossover.assess(synthetic.records(below, seeds=(1, 2, 3), cooled=True))
    assert v["verdict"] == "NOT SUPPORTED" and v["parts"]["crossing"]["state"] == "fail" and not v["confirmatory"], v["sentence"]


def test_the_initial_gap_needs_only_the_first_milestone():
    for seeds in ((42,), (1, 2, 3)):
        v = crossover.assess([r for r in synthetic.records(seeds=seeds) if r["milestone"] == 0])
        gap, general, start = v["parts"]["gap"], v["general_start"], v["curves"]
        assert gap["state"] == "pass" and gap["low"] < -0.08 < gap["high"] < -0.06 and v["verdict"] == "INCONCLUSIVE"
        assert start["cl_bpb"][0] - start["dense_bpb"][0] == pytest.approx(-gap["estimate"])
        assert general["estimate"] == pytest.approx(general["dense"] - general["cl"])
        assert general["low"] < general["estimate"] < general["high"]


def test_more_trials_for_model_cl_than_for_dense_bar_the_crossing():
    v = crossover.assess(synthetic.records(CROSS | {("cl", f"lr_mult={lr}"): CROSS["cl", "default"] for lr in (0.1, 0.2, 0.5, 2.0, 3.0)}, **CLAIM))
    assert v["verdict"] == "INCONCLUSIVE" and v["missing"] == ["equal trials"]


def test_replay_controls_may_see_other_batches():
    rows = synthetic.records(CROSS | {("dense", "replay=0.05"): (1.0, lambda t: 0.0, 0.1)}, seeds=(1, 2))
    for r in rows:
        r["stream_hash"] += "5" * (r["recipe"] == "replay=0.05")
    assert ("dense", "replay=0.05") in curves.paired(rows).runs


# --- bad input

def other_stream(rows):
    rows[-1]["stream_hash"] = "f00"


def fewer_milestones(rows):
    del rows[-1]


def other_documents(rows):
    rows[-1]["general"]["test"]["docs"][0][1] += 1


def other_choices(rows):
    rows[-1]["domain"]["val"]["subdomains"]["numpy"]["docs"][0][1] += 1


def one_seed_more(rows):
    rows += [{**r, "seed": 9} for r in rows if r["arm"] == "dense"]


def one_arm(rows):
    rows[:] = [r for r in rows if r["arm"] == "dense"]


def other_seed(rows):
    for r in rows:
        r["seed"] += r["arm"] == "cl"


def no_field(rows):
    del rows[3]["general"]


@pytest.mark.parametrize("harm,words", [(other_stream, "another stream"), (fewer_milestones, "milestones must agree"),
                                        (other_documents, "other documents"), (other_choices, "other documents"),
                                        (one_seed_more, "paired by seed, and cl/default seed 9 is missing"),
                                        (one_arm, "needs a dense arm and cl, the records hold dense"), (other_seed, "paired by seed"),
                                        (no_field, "line 4 has no field 'general'"),
                                        (list.clear, "holds no record")])
def test_records_that_cannot_be_compared_are_refused_in_one_line(tmp_path, harm, words):
    rows = synthetic.records(milestones=4)
    harm(rows)
    with pytest.raises(UserError, match=words) as e:
        crossover.certify([synthetic.write(tmp_path / "run", rows)])
    assert "\n" not in str(e.value) and not (tmp_path / "run" / "crossover.json").exists()


def test_a_missing_and_a_torn_file_end_with_status_2_and_one_line(tmp_path):
    run = synthetic.write(tmp_path / "run", synthetic.records(milestones=4))
    (run / "records.jsonl").write_text((run / "records.jsonl").read_text()[:-50])
    for folder, words in ((tmp_path, "holds no record"), (run, "line 8 is not a whole record")):
        done = subprocess.run([sys.executable, "-m", "nanochat_cl.crossover", str(folder)], capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_same_run_named_twice_is_refused(tmp_path):
    run = synthetic.write(tmp_path / "run", synthetic.records(milestones=4))
    with pytest.raises(UserError, match="two of the runs"):
        curves.load([run, run])


def test_runs_are_pooled_over_seeds_and_the_certificate_is_plain_json(tmp_path, capsys):
    folders = [str(synthetic.write(tmp_path / str(s), synthetic.records(seeds=(s,)))) for s in (1, 2, 3)]
    crossover.main(folders)
    said = capsys.readouterr().out
    v = json.loads((tmp_path / "1" / "crossover.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert v["seeds"] == [1, 2, 3] and v["sentence"] in said and len(v["inputs"]) == 3
    assert said.count("| true crossing, +0.01 at the end | SUPPORTED |") == 2 and "10 seeds |" in said, "the power table is printed"
    assert "--arm" not in said
    assert v == crossover.certify(folders) == files.read_json(tmp_path / "1" / "crossover.json")


def test_a_trial_that_a_guard_stopped_is_lost_on_all_seeds_and_remains_a_trial(tmp_path):
    """Dense explodes at twice the rate, on one of the seeds, when it was the best: it is no run to compare, but an edge of the grid."""
    def write(name: str, arms, seed: int, stopped: bool = False):
        rows = synthetic.records({key: CROSS[key] for key in arms}, **CLAIM | {"seeds": (seed,)})
        folder = synthetic.write(tmp_path / f"{name}{seed}", [r for r in rows if not stopped or r["milestone"] < 3])
        if stopped:
            files.write_json(folder / "stopped.json", {"arm": arms[0][0], "recipe": arms[0][1], "lr_mult": 2.0, "seed": seed})
        return str(folder)
    high = [key for key in CROSS if key[1] == "lr_mult=2.0"]
    others = [key for key in CROSS if key not in high]
    assert [key[0] for key in high] == ["dense"]
    folders = [write("all", others, s) for s in (1, 2, 3)] + [write("high", high, s, s == 2) for s in (1, 2, 3)]
    v = crossover.certify(folders)
    assert v["checks"]["interior dense optimum"]["state"] == "pass" and ", 2 tried" in v["checks"]["interior dense optimum"]["found"]
    assert "1 stopped by a guard" in v["checks"]["equal trials"]["found"] and v["verdict"] == "SUPPORTED", v["sentence"]
    assert len(v["inputs"]) == 7 and "dense/lr_mult=2.0" not in v["curves"]["dense_run"]
    assert len({r["milestone"] for r in curves.load(folders[4:5])}) == 3, "by itself it is a run like others"
