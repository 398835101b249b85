"""nanochat.loss_eval: bits per byte against closed forms and an explicit loop."""
import math

import pytest
import torch
import torch.nn.functional as F

from nanochat import loss_eval
from nanochat.loss_eval import evaluate_bpb


class TableModel:
    """Logits of the next token are a row of a table; loss_reduction="none" gives the flat losses, as GPT does."""

    def __init__(self, table: torch.Tensor):
        self.table = table

    def get_device(self):
        return torch.device("cpu")

    def __call__(self, x, y, loss_reduction):
        assert loss_reduction == "none"
        return F.cross_entropy(self.table[x].flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")


def batches(num: int, V: int, seed: int = 0, ignore: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    out = [(torch.randint(V, (3, 7), generator=rng), torch.randint(V, (3, 7), generator=rng)) for _ in range(num)]
    if ignore:
        for _, y in out:
            y[0, 2:4] = -1
    return out


@pytest.mark.parametrize("V", [2, 64, 97])
def test_a_uniform_model_over_one_byte_tokens_scores_log2_of_the_vocabulary(V):
    bpb = evaluate_bpb(TableModel(torch.zeros(V, V)), batches(4, V), 4, torch.ones(V, dtype=torch.int32))
    assert bpb == pytest.approx(math.log2(V), rel=1e-6)


def test_a_uniform_model_over_bytes_scores_eight_and_longer_tokens_divide_it():
    data = batches(3, 256)
    assert evaluate_bpb(TableModel(torch.zeros(256, 256)), data, 3, torch.ones(256, dtype=torch.int32)) == pytest.approx(8, rel=1e-6)
    assert evaluate_bpb(TableModel(torch.zeros(256, 256)), data, 3, torch.full((256,), 4, dtype=torch.int32)) == pytest.approx(2, rel=1e-6)


def test_any_model_equals_the_explicit_sum_and_specials_and_ignored_targets_count_on_neither_side():
    V = 11
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(1)) * 3
    token_bytes = torch.tensor([0, 1, 2, 3, 1, 5, 0, 1, 2, 4, 0], dtype=torch.int32)
    data = batches(5, V, seed=2, ignore=True)
    bits, num_bytes = 0.0, 0
    for x, y in data[:4]:
        for prev, target in zip(x.flatten().tolist(), y.flatten().tolist()):
            if target >= 0 and token_bytes[target] > 0:
                bits -= math.log2(math.exp(table[prev, target]) / sum(math.exp(v) for v in table[prev].tolist()))
                num_bytes += int(token_bytes[target])
    assert evaluate_bpb(TableModel(table), iter(data), 4, token_bytes) == pytest.approx(bits / num_bytes, rel=1e-5)


def test_without_bytes_the_score_is_infinite():
    V = 5
    model = TableModel(torch.zeros(V, V))
    assert evaluate_bpb(model, batches(2, V), 0, torch.ones(V, dtype=torch.int32)) == float("inf")
    assert evaluate_bpb(model, batches(2, V), 2, torch.zeros(V, dtype=torch.int32)) == float("inf")


def test_ranks_add_up_their_bits_and_their_bytes(monkeypatch):
    """The other rank saw 1000 nats in 50 bytes."""
    V = 8
    added = iter([1000.0, 50])
    monkeypatch.setattr(loss_eval.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loss_eval.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(loss_eval.dist, "all_reduce", lambda t, op: t.add_(next(added)))
    bpb = evaluate_bpb(TableModel(torch.zeros(V, V)), batches(2, V), 2, torch.ones(V, dtype=torch.int32))
    assert bpb == pytest.approx((42 * math.log(8) + 1000) / math.log(2) / (42 + 50), rel=1e-6)
