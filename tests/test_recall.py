"""nanochat_cl.recall: forgetting that was planted is shown, and a frozen model forgets nothing."""
import json

import numpy as np
import pytest
import torch
from test_evaluate import BOS, TOKEN_BYTES, tiny_gpt

from nanochat_cl import evaluate, recall

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
    model = tiny_gpt(noise=0.02)
    a, b = passages(60, 90, 6, seed=1), passages(200, 230, 6, seed=2)
    asked = recall.sample(1000, [("a", row) for row in a], 4, 0) + recall.sample(2000, [("b", row) for row in b], 4, 0)
    begun = recall.nats_and_bytes(model, asked, TOKEN_BYTES).tolist()
    before = {"a": heldout_bpb(model, 60, 90), "b": heldout_bpb(model, 200, 230)}
    gains = lambda: {"a": before["a"] - heldout_bpb(model, 60, 90), "b": before["b"] - heldout_bpb(model, 200, 230)}
    assert recall.score(model, asked, begun, 0, gains(), TOKEN_BYTES) == {"mean": None, "windows": []}

    train(model, a, 60)
    first = recall.score(model, asked, begun, 1000, gains(), TOKEN_BYTES)
    assert [(w["tokens"], w["age_tokens"], w["subdomain"]) for w in first["windows"]] == [(1000, 0, "a")]
    learned = first["windows"][0]
    assert learned["recall_bpb"] > 0.2, learned
    assert learned["recall_bpb"] == pytest.approx(learned["gain_bpb"] - learned["heldout_gain_bpb"])

    train(model, b, 120)
    second = recall.score(model, asked, begun, 2000, gains(), TOKEN_BYTES)
    old, new = second["windows"]
    assert (old["tokens"], old["age_tokens"], new["tokens"], new["age_tokens"]) == (1000, 1000, 2000, 0)
    assert old["recall_bpb"] < learned["recall_bpb"] - 0.2, f"{learned['recall_bpb']:.3f} -> {old['recall_bpb']:.3f}"
    assert new["recall_bpb"] > old["recall_bpb"] + 0.2
    assert second["mean"] == pytest.approx((old["recall_bpb"] + new["recall_bpb"]) / 2)
    json.dumps(second, allow_nan=False)


def test_a_frozen_model_has_recall_zero_at_every_age():
    model, asked = tiny_gpt(), []
    for window in range(1, 5):
        asked += recall.sample(window * 100, [("ab"[window % 2], row) for row in passages(60, 90, 5, seed=window)], 3, 0)
    begun = recall.nats_and_bytes(model, asked, TOKEN_BYTES).tolist()
    result = recall.score(model, asked, begun, 400, {"a": 0.0, "b": 0.0}, TOKEN_BYTES)
    assert len(result["windows"]) == 4
    assert all(abs(w["recall_bpb"]) < 1e-6 for w in result["windows"]), result  # batches differ between the two calls: rounding only


def test_gain_is_the_bpb_before_minus_the_bpb_now_of_the_pooled_passages():
    before, now, rows = tiny_gpt(0), tiny_gpt(1), passages(60, 300, 3, seed=5)
    asked = recall.sample(10, [("a", row) for row in rows], 9, 0)
    begun = recall.nats_and_bytes(before, asked, TOKEN_BYTES).tolist()
    panel = evaluate.plan(["a"] * 3, rows, rows=1)
    bpb = [evaluate.pooled(evaluate.score(m, panel, TOKEN_BYTES))["bpb"] for m in (before, now)]
    window = recall.score(now, asked, begun, 15, {"a": 0.25}, TOKEN_BYTES)["windows"][0]
    assert window == {"tokens": 10, "age_tokens": 5, "subdomain": "a", "gain_bpb": pytest.approx(bpb[0] - bpb[1], rel=1e-4),
                      "heldout_gain_bpb": 0.25, "recall_bpb": pytest.approx(bpb[0] - bpb[1] - 0.25, rel=1e-4)}


def test_the_sample_of_a_window_is_bounded_and_the_same_in_any_order():
    rows = [("a", torch.from_numpy(row)) for row in passages(60, 300, 20, seed=3)]
    texts = lambda found: [tuple(p[2]) for p in found]
    one, two, other = recall.sample(100, rows, 4, 0), recall.sample(100, [*rows[::-1], rows[3]], 4, 0), recall.sample(100, rows, 4, 1)
    assert len(one) == 4 and texts(one) == texts(two) and {*texts(one)} != {*texts(other)}
    assert len(recall.sample(100, rows[:1] * 3, 4, 0)) == 1, "the same row is one passage"


def test_sub_domains_of_one_window_are_kept_apart_and_have_their_own_held_out_gain():
    before, now, rows = tiny_gpt(0), tiny_gpt(1), passages(60, 300, 4, seed=5)
    asked = recall.sample(10, [("a", row) for row in rows[:2]] + [("b", row) for row in rows[2:]], 9, 0)
    begun = recall.nats_and_bytes(before, asked, TOKEN_BYTES).tolist()
    result = recall.score(now, asked, begun, 10, {"a": 0.25, "b": -0.5}, TOKEN_BYTES)
    found = {w["subdomain"]: w for w in result["windows"]}
    for name, mine, heldout in (("a", rows[:2], 0.25), ("b", rows[2:], -0.5)):
        panel = evaluate.plan([name] * 2, mine, rows=1)
        gain = np.subtract(*(evaluate.pooled(evaluate.score(m, panel, TOKEN_BYTES))["bpb"] for m in (before, now)))
        assert found[name]["gain_bpb"] == pytest.approx(gain, rel=1e-4) and found[name]["recall_bpb"] == pytest.approx(gain - heldout, rel=1e-4)
    assert result["mean"] == pytest.approx((found["a"]["recall_bpb"] + found["b"]["recall_bpb"]) / 2)
