"""nanochat_cl.accounting: closed forms against the models themselves and against torch's own counter of FLOPs."""
import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanochat_cl import accounting, arms, patching
from nanochat_cl.command import UserError


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied():
        yield


def meta_model(arm="cl", **sizes):
    from nanochat import gpt
    sizes = {**dict(sequence_len=2048, vocab_size=32768, n_layer=4, n_head=2, n_kv_head=2, n_embd=256, window_pattern="SSSL"), **sizes}
    cl = arms.cl(sizes["n_embd"], 5, arm)
    with torch.device("meta"):
        return gpt.GPT(gpt.GPTConfig(**sizes, **({} if cl is None else {"cl": cl})))


SIZES = [
    dict(n_layer=depth, n_embd=64 * depth, n_head=depth // 2, n_kv_head=depth // 2) for depth in (4, 6, 12, 20, 24)
] + [dict(n_layer=5, n_embd=128, n_head=4, n_kv_head=2, vocab_size=1000, sequence_len=512, window_pattern="SL"),
     dict(n_layer=3, n_embd=96, n_head=2, n_kv_head=1, vocab_size=97, sequence_len=64)]
PUBLISHED = {4: (36_700_242, 80_216_496), 6: (73_531_538, 167_510_808), 12: (286_261_730, 759_696_048),
             20: (896_533_746, 2_886_212_784), 24: (1_384_122_122, 4_775_225_616)}  # nanochat's own, specification 25


@pytest.mark.parametrize("sizes", SIZES)
def test_dense_figures_are_nanochats_own(sizes):
    model = meta_model("dense", **sizes)
    total = sum(p.numel() for p in model.parameters())
    config = dataclasses.asdict(model.config)
    assert accounting.params(config) == {"total": total, "active": total}
    assert accounting.flops_per_token(config) == model.estimate_flops() and accounting.matmul_params(config) == model.num_matmul_params()
    if "vocab_size" not in sizes:
        assert (total, model.estimate_flops()) == PUBLISHED[sizes["n_layer"]]


@pytest.mark.parametrize("arm", ["cl", "cl-full"])
@pytest.mark.parametrize("sizes", SIZES)
def test_parameters_of_model_cl_are_counted_exactly_and_the_scaling_rules_see_the_dense_model(sizes, arm):
    model, dense = meta_model(arm, **sizes), meta_model("dense", **sizes)
    total = sum(p.numel() for p in model.parameters())
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    counted = accounting.params(config)
    assert counted["total"] == total and accounting.routers(config) == total - sum(p.numel() for p in dense.parameters())
    if "vocab_size" not in sizes:
        assert accounting.routers(config) < 0.005 * total
    assert (counted["active"] == total) == (arm == "cl-full")
    assert model.num_scaling_params() == dense.num_scaling_params()
    assert model.estimate_flops() == accounting.flops_per_token(config)


def test_active_parameters_are_those_of_the_blocks_that_work():
    model = meta_model(n_layer=20, n_embd=1280, n_head=10, n_kv_head=10)
    assert model.config.cl["blocks"] == 40 and model.config.cl["shared"] == 5 and model.config.cl["active"] == 10
    counted = accounting.params(model.config)
    assert counted["total"] - counted["active"] == 20 * 2 * 25 * 128 * 1280
    ceiling = 2_886_212_784 / model.estimate_flops()
    assert 1.50 < ceiling < 1.53, ceiling


@pytest.mark.parametrize("sizes", [
    dict(n_layer=2, n_embd=64, n_head=2, n_kv_head=2, vocab_size=128, sequence_len=256),
    dict(n_layer=4, n_embd=128, n_head=4, n_kv_head=2, vocab_size=512, sequence_len=512),
    dict(n_layer=3, n_embd=256, n_head=2, n_kv_head=2, vocab_size=256, sequence_len=1024),
    dict(n_layer=2, n_embd=640, n_head=5, n_kv_head=5, vocab_size=1024, sequence_len=256)])
@pytest.mark.parametrize("arm", ["dense", "cl", "cl-full"])
def test_closed_form_flops_are_what_torch_counts(arm, sizes):
    model, B, T = meta_model(arm, **sizes, window_pattern="L"), 1, sizes["sequence_len"]
    model.to_empty(device="cpu")
    model.init_weights()
    idx = torch.randint(sizes["vocab_size"], (B, T))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    counted = sum(n for op, n in counts.items() if "attention" not in op)   # attention apart: whether the counter sees it depends on the kernel
    if arm != "dense":
        # the sum over chunks in the gradient of the gather is bookkeeping of one backend, not work of the model
        cl, starts = model.config.cl, len(accounting.boundaries(T, model.config.cl["chunk"]))
        counted -= 2 * sizes["n_layer"] * 2 * (cl["blocks"] - cl["shared"]) * B * starts * cl["active"] * cl["block"] * sizes["n_embd"]
    expected = B * T * (accounting.flops_per_token(model.config) - sum(12 * sizes["n_embd"] * w for w in accounting.windows(model.config)))
    assert counted == pytest.approx(expected, rel=0.01), counts


def test_widths_that_blocks_cannot_cut_are_refused():
    for width in (20, 130, 1000):
        with pytest.raises(UserError, match="multiple"):
            arms.cl(width, 0, "cl")
    with pytest.raises(UserError, match="no arm 'sparse'.*dense"):
        arms.cl(128, 0, "sparse")
    with pytest.raises(UserError, match="unknown option chunks"):
        arms.cl(128, 0, "cl", chunks=5)
    with pytest.raises(UserError, match="active"):
        arms.cl(128, 0, "cl", active=15)
    assert arms.cl(128, 0, "dense") is None
