"""Phase B with rows longer than Phase A's: what is far back is seen."""

from contextlib import ExitStack

import pytest
import torch

import toy_phase_a
from nanochat_cl import accounting, evolve, files, patching
from nanochat_cl.command import UserError

T, LONG = toy_phase_a.T, 8 * toy_phase_a.T  # two layers see no further than 2 x T if their windows stay those of Phase A
FLAGS = [*toy_phase_a.ARGS, "--total-batch-size", "512", "--device-batch-size", "2", "--max-tokens", "1024", "--milestone-tokens", "1024"]


def reach(model, needle=3, length=LONG):
    """The furthest position whose loss depends on the token at `needle`."""
    x = torch.randint(0, 200, (1, length + 1), generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[0, needle] += 1
    with torch.no_grad():
        a, b = (model(t[:, :-1], t[:, 1:], loss_reduction="none").flatten() for t in (x, other))
    return int((a != b).nonzero().max())


def test_a_token_beyond_phase_as_context_changes_the_loss(base):
    def begun(*more):
        with patching.applied():
            with ExitStack() as held:
                return evolve.begin(evolve.parse([*FLAGS, "--arms", "dense", *more]), held)
    short, long = begun("--name", "short").learners[0].model, begun("--name", "long", "--max-seq-len", str(LONG)).learners[0].model
    for model in (short, long):  # the toy's output projections are next to zero
        for name, p in model.named_parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
    whole = {"S": 128, "L": LONG}  # a short window is Phase A's quarter, rounded up to 128
    assert long.window_sizes == [(whole[letter], 0) for letter in (long.config.window_pattern * 2)[:1] + "L"]
    assert accounting.windows(long.config) == [left for left, _ in long.window_sizes], "what the FLOPs are counted with"
    assert reach(long) > LONG - 8, reach(long)
    assert reach(short) < LONG - 8, reach(short)


def test_short_windows_are_counted_as_phase_as_when_the_context_grows():
    config = {"sequence_len": 4096, "trained_len": 1024, "window_pattern": "SSSL", "n_layer": 6}
    assert accounting.windows(config) == [256, 256, 256, 4096, 256, 4096]
    assert accounting.windows({**config, "trained_len": 4096})[0] == 1024
    assert accounting.windows({**config, "trained_len": 128})[0] == 128, "which was the whole context then"


def test_both_arms_train_on_long_rows_and_the_run_remembers_their_length(base):
    evolve.evolve(evolve.parse([*FLAGS, "--name", "both", "--max-seq-len", str(LONG)]))
    records = files.read_jsonl(base / "evolve" / "both" / "records.jsonl")
    assert [(r["arm"], r["step"]) for r in records] == [(arm, step) for step in (0, 2) for arm in ("dense", "cl")]
    assert files.read_json(base / "evolve" / "both" / "config.json")["asked"]["seq_len"] == LONG
    with pytest.raises(UserError, match="seq_len"):
        evolve.evolve(evolve.parse([*FLAGS, "--name", "both"]))
