"""nanochat_cl.recall: forgetting that was planted is shown, a frozen model forgets nothing, and the state survives JSON."""
import json

import numpy as np
import pytest
import torch
from test_evaluate import BOS, TOKEN_BYTES, tiny_gpt

from nanochat_cl import evaluate
from nanochat_cl.recall import Recall

T = 24


def passages(low: int, high: int, n: int, seed: int) -> np.ndarray:
    """n rows of a sub-domain that uses the ids low..high only."""
    rows = np.random.default_rng(seed).integers(low, high, (n, T + 1))
    rows[:, 0] = BOS
    return rows


def train(model, rows: np.ndarray, steps: int) -> None:
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.from_numpy(rows)
    for _ in range(steps):
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def heldout_bpb(model, low: int, high: int) -> float:
    rows = passages(low, high, 8, seed=99)
    return evaluate.pooled(evaluate.score(model, evaluate.plan(["h"] * 8, rows, rows=8), TOKEN_BYTES))["bpb"]


def test_training_on_one_sub_domain_and_long_on_another_shows_as_forgetting():
    torch.manual_seed(0)
    model, recall = tiny_gpt(noise=0.02), Recall(4, seed=0)
    a, b = passages(60, 90, 6, seed=1), passages(200, 230, 6, seed=2)
    recall.add(1000, "a", a)
    recall.add(2000, "b", b)
    recall.baseline(model, TOKEN_BYTES)
    before = {"a": heldout_bpb(model, 60, 90), "b": heldout_bpb(model, 200, 230)}
    gains = lambda: {"a": before["a"] - heldout_bpb(model, 60, 90), "b": before["b"] - heldout_bpb(model, 200, 230)}
    assert recall.score(model, 0, gains(), TOKEN_BYTES) == {"mean": None, "windows": []}

    train(model, a, 60)
    first = recall.score(model, 1000, gains(), TOKEN_BYTES)
    assert [(w["tokens"], w["age_tokens"], w["subdomain"]) for w in first["windows"]] == [(1000, 0, "a")]
    learned = first["windows"][0]
    assert learned["recall_bpb"] > 0.2, learned
    assert learned["recall_bpb"] == pytest.approx(learned["gain_bpb"] - learned["heldout_gain_bpb"])

    train(model, b, 120)
    second = recall.score(model, 2000, gains(), TOKEN_BYTES)
    old, new = second["windows"]
    assert (old["tokens"], old["age_tokens"], new["tokens"], new["age_tokens"]) == (1000, 1000, 2000, 0)
    assert old["recall_bpb"] < learned["recall_bpb"] - 0.2, f"{learned['recall_bpb']:.3f} -> {old['recall_bpb']:.3f}"
    assert new["recall_bpb"] > old["recall_bpb"] + 0.2
    assert second["mean"] == pytest.approx((old["recall_bpb"] + new["recall_bpb"]) / 2)
    json.dumps(second, allow_nan=False)


def test_a_frozen_model_has_recall_zero_at_every_age():
    model, recall = tiny_gpt(), Recall(3, seed=0)
    for window in range(1, 5):
        recall.add(window * 100, "ab"[window % 2], passages(60, 90, 5, seed=window))
    recall.baseline(model, TOKEN_BYTES)
    result = recall.score(model, 400, {"a": 0.0, "b": 0.0}, TOKEN_BYTES)
    assert len(result["windows"]) == 4
    assert all(abs(w["recall_bpb"]) < 1e-6 for w in result["windows"]), result  # batches differ between the two calls: rounding only


def test_gain_is_the_bpb_before_minus_the_bpb_now_of_the_pooled_passages():
    before, now, recall = tiny_gpt(0), tiny_gpt(1), Recall(9, seed=0)
    rows = passages(60, 300, 3, seed=5)
    recall.add(10, "a", rows)
    recall.baseline(before, TOKEN_BYTES)
    panel = evaluate.plan(["a"] * 3, rows, rows=1)
    bpb = [evaluate.pooled(evaluate.score(m, panel, TOKEN_BYTES))["bpb"] for m in (before, now)]
    window = recall.score(now, 15, {"a": 0.25}, TOKEN_BYTES)["windows"][0]
    assert window == {"tokens": 10, "age_tokens": 5, "subdomain": "a", "gain_bpb": pytest.approx(bpb[0] - bpb[1], rel=1e-4),
                      "heldout_gain_bpb": 0.25, "recall_bpb": pytest.approx(bpb[0] - bpb[1] - 0.25, rel=1e-4)}


def test_the_sample_of_a_window_is_bounded_and_the_same_in_any_order():
    rows = passages(60, 300, 20, seed=3)
    one, two, other = Recall(4, seed=0), Recall(4, seed=0), Recall(4, seed=1)
    one.add(100, "a", rows)
    for i in reversed(range(20)):
        two.add(100, "a", torch.from_numpy(rows[i:i + 1]))
    other.add(100, "a", rows)
    keys = lambda recall: [p[1] for p in recall.passages]
    assert len(keys(one)) == 4 and keys(one) == keys(two)
    assert {tuple(p[3]) for p in one.passages} != {tuple(p[3]) for p in other.passages}
    two.add(200, "a", rows)
    assert keys(two)[:4] == keys(one) and len(keys(two)) == 8


def test_a_resumed_recall_gives_the_same_numbers():
    before, now, recall, resumed = tiny_gpt(0), tiny_gpt(1), Recall(2, seed=0), Recall(2, seed=0)
    for each in (recall, resumed):
        each.add(100, "a", passages(60, 90, 5, seed=1))
    recall.baseline(before, TOKEN_BYTES)
    resumed.load_state_dict(json.loads(json.dumps(recall.state_dict())))
    assert resumed.score(now, 300, {"a": 0.1}, TOKEN_BYTES) == recall.score(now, 300, {"a": 0.1}, TOKEN_BYTES)


def test_scoring_a_passage_without_a_baseline_is_refused():
    recall = Recall(2, seed=0)
    recall.add(100, "a", passages(60, 90, 2, seed=1))
    with pytest.raises(RuntimeError, match="baseline"):
        recall.score(tiny_gpt(), 100, {"a": 0.0}, TOKEN_BYTES)
