"""Record sets that look like a crossing, or like a refusal, and are none: each planted on a claim that meets every condition."""
import copy

import pytest

import synthetic
from nanochat_cl import crossover, curves, files
from nanochat_cl.command import UserError
from synthetic import CLAIM, CROSS, RATES, claimed

CL = CROSS["cl", "default"]
BELOW = {("dense", recipe): CROSS["dense", recipe] for _, recipe in RATES} | {  # cl, at the same rates, never comes near
    ("cl", recipe): (CROSS["dense", recipe][0], lambda t, of=CROSS["dense", recipe][1]: -0.08 + of(t), 0.2) for _, recipe in RATES}


def failed(v: dict, check: str, state: str = "fail") -> bool:
    """That check alone did not pass."""
    return {name: x["state"] for name, x in v["checks"].items() if x["state"] != "pass" and name != "interior optimum of Model-CL"} == {check: state}


def test_a_dense_limit_before_the_cool_down_is_none():
    """Dense gets worse at the very end, so that its best milestone lies before the last; by then its rate has not come down."""
    def late(r):
        r["lr_mult"] *= 1 if r["milestone"] == 8 else 1 / (1 - r["milestone"] / 8)  # cooled at the last milestone alone
        if r["arm"] == "dense" and r["milestone"] == 7:
            r["domain"]["val"]["bpb"] -= 0.3
    v = claimed(harm=late)
    assert v["dense_limit"]["milestone"] == 7 and v["checks"]["cool-down"]["state"] == "fail", v["checks"]["cool-down"]
    assert v["verdict"] == "PARTLY" and "beyond the dense limit" not in v["holds"]


@pytest.mark.parametrize("place", ["domain on val", "a domain document", "a general document"])
def test_a_score_that_is_not_finite_is_refused_and_never_the_best(place):
    def harm(r):
        if (r["recipe"], r["seed"], r["milestone"]) == ("lr_mult=2.0", 2, 5):
            if place == "domain on val":
                r["domain"]["val"]["bpb"] = float("nan")
            else:
                test = r["general"]["test"] if "general" in place else r["domain"]["test"]["subdomains"]["numpy"]
                test["docs"][0][0] = float("nan")
    with pytest.raises(UserError, match="not finite from milestone 5 on"):
        claimed(harm=harm)


def test_rates_of_another_recipe_do_not_make_an_optimum_interior():
    arms = {("dense", "lr_schedule=linear"): (1.0, lambda t: 0.0, 0.25), ("dense", "lr_mult=0.1"): (0.1, lambda t: -0.1 * t, 0.2),
            ("dense", "lr_mult=10.0"): (10.0, lambda t: -0.1 * t, 0.2), ("cl", "default"): CROSS["cl", "default"]}
    v = claimed(arms)
    assert v["dense_limit"]["run"] == "dense/lr_schedule=linear" and v["checks"]["interior dense optimum"]["state"] == "fail"
    assert v["verdict"] == "INCONCLUSIVE" and v["holds"] == ["initial gap", "floor kept"]


def test_options_that_mean_nothing_to_dense_make_no_trials_of_it():
    options = [*(f"plasticity=budget:0.{i}" for i in range(1, 6)), "plasticity=blocks:0.5", "plasticity=routers:1.0"]
    arms = CROSS | {("dense", o): CROSS["dense", "default"] for o in options} | {("cl", o): CROSS["cl", "default"] for o in options}
    v = claimed(arms)
    assert v["checks"]["equal trials"] == dict(state="fail", found="5 dense, 8 other (arms x recipes; no more than dense)")
    assert v["verdict"] == "INCONCLUSIVE"


def test_phase_a_is_compared_on_every_seed():
    more = lambda r: r.update(phase_a_tokens=r["phase_a_tokens"] * (10 if (r["arm"], r["seed"]) == ("cl", 3) else 1))
    v = claimed(harm=more)
    assert v["checks"]["same Phase A"]["state"] == "fail" and v["verdict"] == "INCONCLUSIVE"


def test_a_single_dense_rate_is_crossed_by_nobody():
    v = claimed({key: value for key, value in CROSS.items() if "lr_mult" not in key[1]})
    assert v["parts"]["crossing"]["state"] == "barred" and v["verdict"] == "INCONCLUSIVE" and v["missing"] == ["interior dense optimum"]


def test_a_mean_that_passes_without_its_bands_has_no_crossing_point():
    """Seeds that differ by more than they gain; and a lead that is lost again."""
    cl = lambda gain: {**{key: value for key, value in CROSS.items() if key[0] == "dense"}, ("cl", "default"): (1.0, gain, 0.1)}
    v = claimed(cl(lambda t: -0.08 + 0.09 * t), sd=0.05)
    assert v["parts"]["crossing"]["state"] == "open" and v["mean_above_from"], v["sentence"]
    assert "which the bands don't confirm: no crossing" in v["sentence"] and v["crossing_tokens"] is v["crossing_between"] is None
    assert v["censored_after_tokens"] == 1_048_576
    v = claimed(cl(lambda t: 0.1 - 0.5 * abs(t - 0.5)))
    assert "was ahead at 0.66M of 1.05M tokens and fell behind again: no crossing" in v["sentence"] and v["crossing_tokens"] is None, v["sentence"]


def test_short_questions_are_not_the_text_that_must_be_routed():
    assert claimed(harm=lambda r: r["constant_share"].update(facts=1.0))["verdict"] == "SUPPORTED"
    for panel in ("domain", "general", "floor"):
        v = claimed(harm=lambda r: r["constant_share"].update({panel: 0.2}))
        assert v["checks"]["routed tokens"]["state"] == "fail" and v["verdict"] == "PARTLY", panel


def test_phase_a_has_read_the_same_text():
    v = claimed(harm=lambda r: r.update(phase_a_text=r["arm"]))
    assert v["checks"]["same Phase A"] == dict(state="fail", found="1,048,576 tokens of 4 different texts")


def test_batches_of_another_size_are_other_streams_by_intent():
    rows = synthetic.records(CROSS | {("dense", "total_batch_size=16384"): (1.0, lambda t: 0.0, 0.1)}, seeds=(1, 2))
    for r in rows:
        r["stream_hash"] += "5" * (r["recipe"] == "total_batch_size=16384")
    assert ("dense", "total_batch_size=16384") in curves.paired(rows).runs


def test_another_schedule_is_refused_where_replay_lets_the_streams_differ():
    arms = {key if key[0] == "dense" else ("cl", "replay=0.05"): value for key, value in CROSS.items()}
    def harm(r):
        if r["arm"] == "cl":
            r["stream_hash"] += "5"
            r["schedule"] = "iid"
    with pytest.raises(UserError, match="ran on schedule iid"):
        claimed(arms, harm)


def test_a_model_that_dominates_has_kept_its_floor():
    above = {key: (lr, (lambda t: 0.08) if key[0] == "cl" else gain, lost) for key, (lr, gain, lost) in CROSS.items()}
    assert claimed(above)["verdict"] == "DOMINATES" and claimed(above)["missing"] == []
    above["cl", "default"] = (1.0, lambda t: 0.08, 2.0)
    assert claimed(above)["verdict"] == "INCONCLUSIVE"


# --- what a hostile referee obtained a verdict with (2026-11-27)

def test_seeds_that_share_a_phase_a_are_one():
    """One Phase A for three streams; and one run under three names. Their intervals would say nothing of another model."""
    def one_phase_a(rows):
        first = {}
        for r in rows:
            if r["milestone"] == 0:
                r.update({part: copy.deepcopy(first.setdefault((r["arm"], r["recipe"]), r)[part]) for part in ("domain", "general")})
    def one_run(rows):
        rows[:] = [r | {"seed": s} for r in rows if r["seed"] == 1 for s in (1, 2, 3)]
    for harm in (one_phase_a, one_run):
        rows = synthetic.records(CROSS, **CLAIM)
        harm(rows)
        v = crossover.assess(rows)
        assert v["checks"]["seeds"]["state"] == "fail" and v["checks"]["seeds"]["found"].startswith("1 with a Phase A of their own, of 3 ")
        assert v["verdict"] == "INCONCLUSIVE" and v["holds"] == [] and "seeds" in v["missing"]
    assert v["checks"]["seeds"]["found"].endswith("all read the stream in one order")


@pytest.mark.parametrize("recipe", ["replay=0.25", "optimizer=reset,warmup_steps=20,weight_decay=0.2", "total_batch_size=16384",
                                    "cooldown_frac=0.9,lr_schedule=wsd", "plasticity=frozen-shared:0.1"])
def test_what_dense_was_never_given_makes_no_crossing(recipe):
    def harm(r):
        r["stream_hash"] += "5" * (r["recipe"] == recipe and ("replay" in recipe or "batch" in recipe))
    arms = {key: value for key, value in CROSS.items() if key[0] != "cl"} | {("cl", recipe): CL}
    v = claimed(arms, harm)
    assert v["verdict"] == "INCONCLUSIVE" and failed(v, "same recipe") and "crossing" not in v["holds"]
    given = {("dense", recipe): (1.0, lambda t: -0.02 * t, 0.25), ("cl", recipe + ",plasticity=budget:0.25"): CL}
    if "plasticity" not in recipe:                                      # to dense a budget is nothing
        v = claimed({**{key: value for key, value in arms.items() if key[0] != "cl"}, **given},
                    lambda r: r.update(stream_hash=r["stream_hash"] + "5" * (r["recipe"].startswith(recipe) and ("replay" in recipe or "batch" in recipe))))
        assert v["verdict"] == "SUPPORTED", v["sentence"]


@pytest.mark.parametrize("control", ["dense-rows", "dense-frozen"])
def test_a_claim_has_its_controls(control):
    v = claimed({key: value for key, value in CROSS.items() if key[0] != control})
    assert v["verdict"] == "INCONCLUSIVE" and failed(v, "controls") and control in v["checks"]["controls"]["found"]


def test_every_run_has_the_same_phase_a_and_unknown_text_is_not_tested():
    """A control with ten times the pretraining would lend the initial gap that the fair dense model does not have."""
    arms = CROSS | {("dense-big", "default"): (1.0, lambda t: 0.05 - 0.5 * t, 0.25), ("cl", "default"): (1.0, lambda t: 0.01 + 0.05 * t, 0.15)}
    v = claimed(arms, lambda r: r.update(phase_a_tokens=r["phase_a_tokens"] * (10 if r["arm"] == "dense-big" else 1)))
    assert v["parts"]["gap"]["state"] == "pass" and v["verdict"] == "INCONCLUSIVE" and failed(v, "same Phase A")
    v = claimed(harm=lambda r: r.update(phase_a_text=None))
    assert v["verdict"] == "INCONCLUSIVE" and failed(v, "same Phase A", "not tested")


def test_one_dense_trial_under_many_names_is_one():
    budgets = [f"plasticity=frozen-shared:0.5+budget:0.{i}" for i in range(1, 9)]
    v = claimed(CROSS | {("dense", name): CROSS["dense", "default"] for name in budgets} | {("cl", name): CL for name in budgets})
    assert v["checks"]["equal trials"]["found"].startswith("6 dense, 9 other") and v["verdict"] == "INCONCLUSIVE"
    low = {("dense-low-lr", recipe): CROSS["dense", recipe] for _, recipe in RATES}
    v = claimed(CROSS | low | {("cl", f"lr_mult={lr}"): CL for lr in (0.5, 2.0, 3.0, 4.0, 5.0)})
    assert v["checks"]["equal trials"]["found"].startswith("5 dense, 6 other") and v["verdict"] == "INCONCLUSIVE"


def test_a_dense_trial_that_was_ahead_where_it_ended_bars_the_limit_it_is_missing_from():
    trial = {"arm": "dense", "recipe": "lr_mult=1.5", "lr_mult": 1.5, "seed": 2}
    assert claimed(gone=[trial | {"ended": {1: 9.0, 3: 9.0}}])["verdict"] == "SUPPORTED"
    v = claimed(gone=[trial | {"ended": {1: 0.5, 3: 0.5}}])
    assert v["verdict"] == "INCONCLUSIVE" and failed(v, "stopped trials") and "dense/lr_mult=1.5" in v["checks"]["stopped trials"]["found"]


@pytest.mark.parametrize("where", [lambda r: r["milestone"] in (0, 4), lambda r: r["seed"] == 1])
def test_isolation_is_known_of_every_record(where):
    v = claimed(harm=lambda r: r.update(blocks=r["blocks"] if where(r) else None))
    assert failed(v, "exercised isolation", "not tested") and v["verdict"] == "PARTLY"
    v = claimed(harm=lambda r: r.update(constant_share={"domain": 0.04}))
    assert failed(v, "routed tokens", "not tested") and v["verdict"] == "PARTLY"


def test_runs_of_another_setting_or_size_are_not_compared():
    v = claimed(harm=lambda r: r.update(setting=r["setting"] | {"dtype": "bfloat16"} if r["arm"] == "cl" else r["setting"]))
    assert v["verdict"] == "INCONCLUSIVE" and failed(v, "same setting") and v["checks"]["same setting"]["found"] == "runs differ in dtype"
    assert failed(claimed(harm=lambda r: r.pop("setting")), "same setting", "not tested")
    v = claimed(harm=lambda r: r.update(params_total=r["params_total"] * 10) if r["arm"] == "cl" else None)
    assert v["verdict"] == "PARTLY" and failed(v, "matched") and v["matched"] == [] and claimed()["matched"] == ["total parameters"]


def test_the_dense_run_of_the_end_has_an_optimum_inside_its_grid_as_well_as_the_limit():
    """The limit lies early, at a rate in the middle; at the end another schedule is best, tried at one rate only. And a grid too narrow."""
    arms = CROSS | {("dense", "default"): (1.0, lambda t: 0.35 * (t == 0.75), 0.25), ("dense", "lr_schedule=linear"): (1.0, lambda t: 0.02 * t, 0.25)}
    v = claimed(arms)
    assert v["dense_limit"]["run"] == "dense/default" and v["curves"]["dense_run"][-1] == "dense/lr_schedule=linear"
    assert v["checks"]["interior dense optimum"]["state"] == "fail" and v["verdict"] == "INCONCLUSIVE"
    narrow = {key: value for key, value in CROSS.items() if "lr_mult" not in key[1]}
    narrow |= {("dense", f"lr_mult={lr}"): (lr, lambda t: -0.01 * t, 0.25) for lr in (0.99, 1.01)}
    assert failed(claimed(narrow), "interior dense optimum")


def test_one_document_of_a_sub_domain_says_nothing_of_others():
    v = claimed(CROSS | {("cl", "default"): (1.0, lambda t: -0.03 + 0.2 * t, 0.15)}, docs=1, sd=0.0)
    assert v["checks"]["documents"]["state"] == "not tested" and v["verdict"] == "INCONCLUSIVE"


def test_model_cl_is_refused_at_its_own_best_rate_only():
    change = dict(confirmatory=False)
    assert claimed(BELOW, **change)["verdict"] == "NOT SUPPORTED"
    for gone in ("lr_mult=0.5", "lr_mult=2.0"):                         # its best is the edge of what it was given
        v = claimed({key: value for key, value in BELOW.items() if key != ("cl", gone)}, **change)
        assert v["verdict"] == "INCONCLUSIVE" and "interior optimum of Model-CL" in v["missing"]


def test_model_cl_that_exploded_everywhere_is_named():
    rows = synthetic.records({key: CROSS[key] for key in RATES}, **CLAIM)
    with pytest.raises(UserError, match="the records hold .*; a guard stopped cl/default seed 1: run evolve"):
        crossover.assess(rows, gone=[{"arm": "cl", "recipe": "default", "lr_mult": 1.0, "seed": 1}])


def test_loss_at_equal_domain_score_is_read_off_the_line_between_the_ends_of_two_dense_runs():
    """Slower runs end 0.2 u short of the first and lost 0.4, 0.2, 0.1; cl ends where u = 1/4 and has lost 0.35: 0.05 more than the line's 0.3."""
    slow = ((2.0, 0.0, 0.4), (1.5, 0.5, 0.2), (0.5, 1.0, 0.1))
    arms = {("dense", f"lr_mult={lr}"): (lr, lambda t, u=u: -0.2 * u * t, loss) for lr, u, loss in slow}
    cl = {("cl", "default"): (1.0, lambda t: -0.05 * t, 0.35)}
    v = crossover.assess(synthetic.records(arms | cl, seeds=(1, 2, 3), docs=200, sd=0.0))
    equal = v["floor_at_equal_domain"]
    assert equal["between"] == ["dense/lr_mult=1.5", "dense/lr_mult=2.0"] and f"at equal domain score {crossover.interval(equal)} bpb" in v["sentence"]
    assert equal["estimate"] == pytest.approx(0.05, abs=0.01)
    assert v["parts"]["floor"]["estimate"] == pytest.approx(-0.05, abs=0.01), "at equal tokens the best dense run lost more"
    one = crossover.assess(synthetic.records(arms | cl, docs=200, sd=0.0))["floor_at_equal_domain"]
    assert one["low"] < 0.05 < one["high"]
    for outside in (arms | {("cl", "default"): (1.0, lambda t: 0.05, 0.35)}, {("dense", "default"): (1.0, lambda t: 0.0, 0.4)} | cl):
        v = crossover.assess(synthetic.records(outside))
        assert v["floor_at_equal_domain"] is None and "equal domain score" not in v["sentence"], "better than all, or one end alone"


def test_a_control_that_was_left_out_turns_no_crossing_into_a_refusal():
    """A crossing by less than the smallest effect: without a control it is unknown, not refuted."""
    small = CROSS | {("cl", "default"): (1.0, lambda t: 0.003 if t > 0.3 else -0.03, 0.15)}
    whole = claimed(small, seeds=range(1, 9), sd=0.0002, docs=60)
    assert whole["verdict"] == "PARTLY" and whole["parts"]["limit"]["state"] == "fail", whole["sentence"]
    v = claimed({key: value for key, value in small.items() if key[0] != "dense-rows"}, seeds=range(1, 9), sd=0.0002, docs=60)
    assert v["verdict"] == "INCONCLUSIVE" and v["missing"] == ["controls"] and v["parts"]["crossing"]["state"] == "barred", v["sentence"]


def test_a_run_that_stopped_before_its_first_record_is_a_lost_trial_like_any_other(tmp_path):
    rows = synthetic.records(CROSS, **CLAIM)
    whole, gone = synthetic.write(tmp_path / "whole", rows), tmp_path / "gone"
    files.write_json(gone / "stopped.json", {"arm": "cl", "recipe": "lr_mult=9.0", "lr_mult": 9.0, "seed": 1, "step": 0, "reason": "planted"})
    assert [(t["recipe"], t["ended"]) for t in curves.stopped_trials([whole, gone])] == [("lr_mult=9.0", {})]
    assert len(curves.load([whole, gone])) == len(rows)
