"""nanochat_cl.metrics: every formula against numbers worked out by hand, and failures planted into a model."""
import math
import warnings

import numpy as np
import pytest
import torch
from test_evaluate import BOS, tiny_gpt

from nanochat_cl import metrics

#            0    1    2
R = np.array([[8.0, 3.0, 1.0],   # after visit 0
              [6.0, 9.0, 2.0],   # after visit 1
              [7.0, 5.0, 6.0]])  # after visit 2
B = np.array([2.0, 2.0, 2.0])    # Phase A
A_REF = np.array([9.0, 9.0, 9.0])


def test_the_visit_matrix_gives_the_hand_computed_metrics():
    found = metrics.after_visits(R, B, A_REF)
    assert found["acc"] == pytest.approx((7 + 5 + 6) / 3)
    assert found["bwt"] == pytest.approx(((7 - 8) + (5 - 9)) / 2)
    assert found["fwt"] == pytest.approx(((3 - 2) + (2 - 2)) / 2)
    # the best of the rows before the last: 8 for column 0, 9 for column 1 (Mammoth would take the last row in, Avalanche the first only)
    assert found["forgetting"] == pytest.approx(((8 - 7) + (9 - 5)) / 2)
    assert found["learning_accuracy"] == pytest.approx((8 + 9 + 6) / 3)
    assert found["intransigence"] == pytest.approx(((9 - 8) + (9 - 9) + (9 - 6)) / 3)
    assert "intransigence" not in metrics.after_visits(R, B)


def test_forgetting_is_negative_when_the_end_is_the_best():
    better = np.array([[1.0, 0.0], [3.0, 5.0]])
    assert metrics.after_visits(better, np.zeros(2))["forgetting"] == pytest.approx(1 - 3)


def test_curves_give_the_hand_computed_anytime_and_worst_case_scores():
    A = np.array([[2.0, 2.0], [6.0, 1.0], [3.0, 4.0], [5.0, 7.0]])
    found = metrics.over_milestones(A, ends=[1, 3])
    assert found["average_anytime"] == pytest.approx((2 + 3.5 + 3.5 + 6) / 4)
    assert found["min_acc"] == pytest.approx(3.0)                    # column 0 from milestone 1 on: 6, 3, 5
    assert found["wc_acc"] == pytest.approx(7 / 2 + (1 - 1 / 2) * 3)


@pytest.mark.parametrize("scores, expected", [
    ([5.0, 4.0, 3.0, 5.5, 6.0], (2.0, 300.0)),      # down to 3, back after 300 tokens
    ([5.0, 5.5, 4.0, 5.0, 1.0], (4.0, 300.0)),      # the first dip is what the width measures, the deepest what the depth does
    ([5.0, 5.0, 6.0], (0.0, 0.0)),                  # no dip
    ([5.0, 4.0, 4.5], (1.0, math.inf)),             # never back
])
def test_the_stability_gap_has_a_depth_and_a_width(scores, expected):
    assert metrics.stability_gap(np.arange(len(scores)) * 100, np.array(scores)) == pytest.approx(expected)


@pytest.mark.parametrize("target, at", [(-2.0, 0), (-1.5, 0.5), (-1.0, 1.0), (-0.6, 2.4), (0.1, math.nan)])
def test_a_target_is_reached_between_two_milestones(target, at):
    assert metrics.reached(np.array([-2.0, -1.0, -1.0, 0.0]), target) == pytest.approx(at, nan_ok=True)


def asked(facts: np.ndarray, floor: np.ndarray) -> dict:
    """A record's groups of probes, with these bpb of the items' right choices; two probes in each."""
    group = lambda bpb: {name: {"items": [[float(x), 1] for x in part]} for name, part in zip("pq", np.array_split(bpb, 2))}
    return {"facts": group(facts), "floor": group(floor)}


def test_selectivity_is_facts_lost_over_floor_lost_with_an_interval_that_holds_it():
    r = np.random.default_rng(0)
    facts, floor, start = r.normal(0.4, 0.1, 200), r.normal(0.1, 0.1, 200), r.uniform(1, 3, 200)
    rows = [asked(start, start), asked(start + facts, start + floor)]
    np.testing.assert_allclose(metrics.forgotten(rows, 1, "facts"), facts)
    np.testing.assert_allclose(metrics.forgotten(rows, 0.25, "floor"), floor / 4)
    ratio, low, high = metrics.selectivity(facts, floor)
    assert ratio == pytest.approx(facts.mean() / floor.mean()) and low < ratio < high
    # the delta method's 95 % interval, an independent formula
    error = ratio * math.hypot(facts.std() / facts.mean(), floor.std() / floor.mean()) / math.sqrt(200)
    assert (ratio - low, high - ratio) == pytest.approx((1.96 * error, 1.96 * error), rel=0.3)
    same = lambda facts, floor: metrics.selectivity(np.full(9, facts), np.full(9, floor))
    assert same(0.4, 0.1) == pytest.approx((4.0, 4.0, 4.0)) and same(-0.4, 0.1) == (0.0,) * 3 and same(0.4, -0.1) == (math.inf,) * 3


def test_twins_are_one_unit_of_chance():
    items = lambda *bpb: {"items": [[x, 1] for x in bpb]}
    start = {"facts": {"f": items(*[1.0] * 9)}, "floor": {"copying": items(*[1.0] * 6), "file": items(1.0)}}
    end = {"facts": {"f": items(*[1.4] * 9)}, "floor": {"copying": items(*[1.4, 0.8] * 3), "file": items(1.1)}}
    floor = metrics.forgotten([start, end], 1, "floor")
    np.testing.assert_allclose(floor, [0.1] * 4)       # three pairs, of which each lost 0.4 and won 0.2, and an item of a file
    assert metrics.selectivity(metrics.forgotten([start, end], 1, "facts"), floor) == pytest.approx((4.0, 4.0, 4.0)), "as sure as all pairs agree"
    np.testing.assert_array_equal(metrics.units({"floor": {"order": {"items": [[1, 1], [2, 0]]}}}, "floor", "order"), [[1.5, 0.5]])


H = np.array([[1.0, 0.02, 0.0, 3.0],
              [1.0, 0.02, 0.0, 1.0]])  # mean |h| 1, 0.02, 0, 2; the layer's average is 0.755


def test_dormant_units_are_counted_by_hand():
    activity = H.mean(0)
    assert metrics.dormant_share(activity, 0.0) == 1 / 4
    assert metrics.dormant_share(activity, 0.025) == 1 / 4     # 0.02 > 0.025 * 0.755
    assert metrics.dormant_share(activity, 0.1) == 2 / 4
    assert metrics.dormant_share(np.zeros(3), 0.025) == 1.0


def test_the_effective_rank_of_known_spectra():
    assert metrics.effective_rank(np.ones(5)) == pytest.approx(5)
    assert metrics.effective_rank(np.array([3.0, 0.0])) == pytest.approx(1)
    assert metrics.effective_rank(np.array([0.5, 0.25, 0.25])) == pytest.approx(2 ** 1.5)  # entropy 1.5 bits
    assert metrics.effective_rank(np.zeros(3)) == 0


def test_the_stable_rank_of_known_spectra():
    assert metrics.stable_rank(np.array([1.0, 96.0, 3.0])) == 2         # 96 % are not enough, 99 % are
    assert metrics.stable_rank(np.array([96.0, 2.5, 1.5])) == 3
    assert metrics.stable_rank(np.array([5.0, 0.0])) == 1 and metrics.stable_rank(np.zeros(3)) == 0


def test_change_is_the_distance_over_the_norm_for_each_group_of_weights():
    named = lambda attn, fc, wte, scalar: {"transformer.h.0.attn.c_q.weight": attn, "transformer.h.0.mlp.c_fc.weight": fc,
                                           "transformer.h.1.mlp.c_fc.weight": fc, "transformer.wte.weight": wte, "resid_lambdas": scalar}
    tensor = lambda *x: torch.tensor(x)
    found = metrics.change(named(tensor(3.0, 4.0), tensor(1.0, 0.0), tensor(2.0), tensor(2.0)),
                           named(tensor(3.0, 1.0), tensor(1.0, 1.0), tensor(2.0), tensor(1.0)))
    assert found == pytest.approx({"attn": 3 / 5, "mlp": math.sqrt(2 / 2), "wte": 0.0, "scalars": 0.5})


def test_a_block_has_moved_when_one_bit_of_either_matrix_has():
    make = lambda: {f"transformer.h.{i}.mlp.{m}.weight": torch.ones(5, 2, 3) for i in range(2) for m in ("c_fc", "c_proj")}
    before, after = make(), make()
    assert metrics.unmoved(before, after, 1) == 1
    after["transformer.h.0.mlp.c_fc.weight"][0] = 7                     # shared
    after["transformer.h.0.mlp.c_fc.weight"][1, 1, 1] += 1e-6
    after["transformer.h.0.mlp.c_proj.weight"][1] = 7                   # the same one
    after["transformer.h.1.mlp.c_proj.weight"][4, 0, 0] += 1e-6
    assert metrics.unmoved(before, after, 1) == 6 / 8


def test_the_share_of_the_light_tier_is_its_time_over_the_training_between():
    row = lambda arm, tier, train_s, eval_s: dict(arm=arm, tier=tier, train_s=train_s, eval_s=eval_s)
    records = [row("a", "full", 0, 9), row("b", "full", 0, 9), row("a", "light", 10, 10), row("b", "light", 10, 14), row("a", "full", 20, 50)]
    assert metrics.light_share(records) == (1 + 5) / (10 + 10) and metrics.light_share(records[:2]) == 0


def inputs() -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (4, 32)))
    x[:, 0] = BOS
    return x


def test_the_panel_catches_zeroed_units_and_a_collapsed_stream():
    model, x = tiny_gpt(), inputs()
    healthy = metrics.plasticity(model, x)
    assert healthy["dormant_0.0"] < 0.02 and healthy["inactive"] < 0.1 and healthy["effective_rank"] > 8 < healthy["stable_rank"], healthy
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.mlp.c_fc.weight[:64] = 0              # half of the 128 units
    dead = metrics.plasticity(model, x)
    assert dead["dormant_0.0"] >= 0.5 <= dead["inactive"] and dead["mean_abs_weight"] < healthy["mean_abs_weight"], dead
    with torch.no_grad():                               # every token looks the same, so the stream has one direction a position at most
        for table in (model.transformer.wte, *model.value_embeds.values()):
            table.weight[:] = table.weight[0].clone()
    collapsed = metrics.plasticity(model, x)
    assert collapsed["effective_rank"] < 1.5 and collapsed["stable_rank"] <= 2, (healthy, collapsed)


def test_a_unit_is_inactive_below_one_percent_of_the_inputs():
    class Model(torch.nn.Module):
        """Unit i of the one layer answers to token i alone."""
        def __init__(self):
            super().__init__()
            layer = torch.nn.Module()
            layer.mlp, layer.forward = torch.nn.Identity(), lambda x: layer.mlp(x)
            layer.mlp.c_fc = torch.nn.Linear(3, 3, bias=False)
            layer.mlp.c_fc.weight.data = torch.eye(3)
            self.transformer = torch.nn.ModuleDict({"h": torch.nn.ModuleList([layer])})

        def forward(self, x):
            return self.transformer.h[0](torch.nn.functional.one_hot(x, 3).float())

    found = metrics.plasticity(Model(), torch.tensor([[0] * 3 + [1] * 5 + [2] * 392]))   # 0.75 %, 1.25 % and the rest of 400 inputs
    assert found["inactive"] == pytest.approx(1 / 3)


def test_the_panel_measures_what_the_mlp_puts_out_and_leaves_no_hook():
    model, x, hidden = tiny_gpt(), inputs(), []
    hooks = [layer.mlp.c_proj.register_forward_hook(lambda module, args, out: hidden.append(args[0])) for layer in model.transformer.h]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    found = metrics.plasticity(model, x)
    for tau in (0.0, 0.025, 0.1):
        activity = [h.reshape(-1, 128).mean(0) for h in hidden]
        assert found[f"dormant_{tau}"] == pytest.approx(np.mean([(a <= tau * a.mean()).float().mean().item() for a in activity]))
    weights = torch.cat([p.detach().abs().flatten() for layer in model.transformer.h for p in layer.parameters()])
    assert found["mean_abs_weight"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def record(milestone: int, seen: list[str], bpb: dict[str, float], current: str | None = None) -> dict:
    split = {"bpb": sum(bpb.values()) / len(bpb), "subdomains": {s: {"bpb": v, "docs": []} for s, v in bpb.items()}}
    return {"arm": "cl", "seed": 1, "recipe": "default", "milestone": milestone, "tokens": milestone * 100, "seen": seen,
            "subdomain": current or (seen or [None])[-1], "domain": {"val": split, "test": split}}


RECORDS = [record(0, [], {"b": 2.0, "c": 2.0, "a": 2.0}), record(1, ["a"], {"b": 1.9, "c": 2.1, "a": 1.5}),
           record(2, ["a"], {"b": 1.8, "c": 2.2, "a": 1.0}), record(3, ["a", "b"], {"b": 1.2, "c": 2.0, "a": 1.4}),
           record(4, ["a", "b", "c"], {"b": 1.3, "c": 1.1, "a": 1.6})]


def test_the_metrics_of_a_run_follow_from_its_first_visits():
    found = metrics.continual(RECORDS, "val")    # visits end at milestones 2 (a), 3 (b), 4 (c)
    assert found["acc"] == pytest.approx(-(1.6 + 1.3 + 1.1) / 3)
    assert found["learning_accuracy"] == pytest.approx(-(1.0 + 1.2 + 1.1) / 3)
    assert found["bwt"] == pytest.approx(((1.0 - 1.6) + (1.2 - 1.3)) / 2)
    assert found["forgetting"] == pytest.approx(((1.6 - 1.0) + (1.3 - 1.2)) / 2)
    assert found["fwt"] == pytest.approx(((2.0 - 1.8) + (2.0 - 2.0)) / 2)
    assert found["min_acc"] == pytest.approx((-1.6 - 1.3) / 2)
    assert found["wc_acc"] == pytest.approx(-1.1 / 3 + 2 / 3 * found["min_acc"])
    assert (found["gap_depth_bpb"], found["gap_width_tokens"]) == (0, 0)


def test_where_the_stream_comes_back_the_last_subdomains_first_visit_ends_before_the_run():
    found = metrics.continual([*RECORDS, record(5, ["a", "b", "c"], {"b": 1.0, "c": 1.4, "a": 0.9}, current="a")], "val")
    assert found["learning_accuracy"] == pytest.approx(-(1.0 + 1.2 + 1.1) / 3)     # c's at milestone 4, not at the end
    assert found["acc"] == pytest.approx(-(0.9 + 1.0 + 1.4) / 3)
    assert found["bwt"] == pytest.approx(((1.0 - 0.9) + (1.2 - 1.0)) / 2)
    assert found["forgetting"] == pytest.approx(((0.9 - 1.0) + (1.0 - 1.2)) / 2)   # negative: both are at their best
    assert found["fwt"] == pytest.approx(((2.0 - 1.8) + (2.0 - 2.0)) / 2)


def test_two_first_visits_within_one_milestone_share_its_row_and_one_sub_domain_gives_nothing():
    rows = [RECORDS[0], record(1, ["a", "b"], {"b": 1.0, "c": 2.0, "a": 1.0}), record(2, ["a", "b", "c"], {"b": 1.0, "c": 1.0, "a": 1.0})]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.continual(rows, "val")["learning_accuracy"] == pytest.approx(-1)
        assert metrics.continual(RECORDS[:3], "val") == {}


def test_the_metrics_are_of_the_split_that_is_asked_for():
    rows = [record(0, [], {"a": 2.0, "b": 2.0}), record(1, ["a"], {"a": 1.0, "b": 2.0}), record(2, ["a", "b"], {"a": 1.5, "b": 1.0})]
    for r in rows:
        r["domain"]["test"] = {"bpb": 9.0, "subdomains": {s: {"bpb": 3 * x["bpb"], "docs": []} for s, x in r["domain"]["val"]["subdomains"].items()}}
    val, test = metrics.continual(rows, "val"), metrics.continual(rows, "test")
    assert val["acc"] == pytest.approx(-1.25) and test["acc"] == pytest.approx(-3.75)


def test_the_gap_is_that_of_the_mean_over_sub_domains():
    rows = [record(0, [], {"a": 2.0, "b": 2.0}), record(1, ["a"], {"a": 1.0, "b": 3.6}), record(2, ["a", "b"], {"a": 1.5, "b": 1.0})]
    found = metrics.continual(rows, "val")
    assert (found["gap_depth_bpb"], found["gap_width_tokens"]) == (pytest.approx(0.3), 200)


def test_the_interval_of_selectivity_leaves_out_a_fortieth_on_each_side():
    r = np.random.default_rng(0)
    facts, floor = r.normal(0.4, 0.1, 400), np.full(400, 0.1)
    ratio, low, high = metrics.selectivity(facts, floor)
    half = 1.96 * facts.std() / math.sqrt(400) / 0.1
    assert (ratio - low, high - ratio) == pytest.approx((half, half), rel=0.1)
