"""nanochat_cl.accounting: closed forms against the models themselves and against torch's own counter of FLOPs."""
import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanochat_cl import accounting, arms, patching, routing


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied():
        yield


def meta_model(arm="cl", options=None, **sizes):
    from nanochat import gpt
    sizes = {**dict(sequence_len=2048, vocab_size=32768, n_layer=4, n_head=2, n_kv_head=2, n_embd=256, window_pattern="SSSL"), **sizes}
    cl = arms.cl(sizes["n_embd"], sizes["n_head"], 5, arm, **(options or {}))
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


SPARSE = [("cl", {}), ("cl-full", {}), ("cl-mlp", {}), ("cl-token", {}), ("cl-noiso", {}), ("cl-flops", {}), ("cl-flops", {"width_mult": 3.0}),
          ("cl-flops", {"reserve": 0.0}), ("cl", {"reserve": 0.3}), ("cl", {"match": "flops"})]


@pytest.mark.parametrize("arm, options", SPARSE)
@pytest.mark.parametrize("sizes", SIZES)
def test_parameters_of_model_cl_are_counted_exactly_and_the_scaling_rules_see_the_dense_model(sizes, arm, options):
    model, dense = meta_model(arm, options, **sizes), meta_model("dense", **sizes)
    total, cl = sum(p.numel() for p in model.parameters()), model.config.cl
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    counted = accounting.params(config)
    assert counted["total"] == total and accounting.additional(config) == total - sum(p.numel() for p in dense.parameters())
    idle = cl["blocks"] - cl["shared"] - cl["active"]
    assert counted["active"] == total - len(model.transformer.h) * idle * (model.transformer.h[0].mlp.c_fc.weight[0].numel() * 2)
    assert (idle == 0) == (arm == "cl-full" or options == {"match": "flops"})
    assert model.num_scaling_params() == dense.num_scaling_params()
    assert model.estimate_flops() == accounting.flops_per_token(config)


@pytest.mark.parametrize("arm, options", SPARSE)
@pytest.mark.parametrize("sizes", [s for s in SIZES if "vocab_size" not in s])
def test_routers_are_less_than_half_a_percent_and_parameters_are_matched_where_asked(sizes, arm, options):
    model, dense = meta_model(arm, options, **sizes), meta_model("dense", **sizes)
    more = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("router", "balance")))
    total, of = (sum(p.numel() for p in m.parameters()) for m in (model, dense))
    assert 0 < more < 0.005 * of
    mult = options.get("width_mult", 2.0) if arm == "cl-flops" else 1.0
    assert total - more - of == pytest.approx((mult - 1) * sum(p.numel() for b in dense.transformer.h for p in b.mlp.parameters()), abs=1)


@pytest.mark.parametrize("options", [{}, {"width_mult": 1.5, "reserve": 0.25}, {"width_mult": 4.0}, {"reserve": 0.0}])
@pytest.mark.parametrize("sizes", SIZES)
def test_matched_by_flops_a_token_costs_what_it_costs_in_the_dense_model(sizes, options):
    mine, dense = (meta_model(arm, more, **sizes) for arm, more in (("cl-flops", options), ("dense", None)))
    routing = accounting.flops_per_token(mine.config) / dense.estimate_flops() - 1
    allowed = 0.01 if "vocab_size" not in sizes else 0.05  # at toy widths and contexts the routing itself counts
    assert 0 <= routing < allowed, routing


def test_a_released_reserve_costs_more_and_the_ledger_says_so():
    config = dataclasses.asdict(meta_model("cl-flops", n_layer=20, n_embd=1280, n_head=10, n_kv_head=10).config)
    assert config["cl"]["held"] == 35 and config["cl"]["join"] == 9
    for count, join in ((0, 0), (4, 4), (9, 9), (35, 9)):
        now = {**config, "cl": {**config["cl"], "released": count}}
        assert accounting.flops_per_token(now) - accounting.flops_per_token(config) == 6 * 20 * 2 * join * 128 * 1280
        assert accounting.params(now)["active"] - accounting.params(config)["active"] == 20 * 2 * join * 128 * 1280
    said = accounting.ledger(config)
    total, active, flops = (f"{value:,.0f}" for value in (*accounting.params(config).values(), accounting.flops_per_token(config)))
    assert all(figure in said for figure in (total, active, flops)) and "100.2% of dense" in said, said


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
@pytest.mark.parametrize("arm", ["dense", "cl", "cl-full", "cl-flops", "cl-mlp"])
def test_closed_form_flops_are_what_torch_counts(arm, sizes):
    """
    Matmuls. Heads that were not chosen are computed and counted on both sides; the backend is `bmm`, which computes the chosen blocks
    alone, so that what `masked` (and `auto` for short chunks) computes more never comes in.
    """
    model, B, T = meta_model(arm, None if arm == "dense" else {"backend": "bmm"}, **sizes, window_pattern="L"), 1, sizes["sequence_len"]
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


@pytest.mark.parametrize("sizes", [dict(window_pattern="L"), dict(window_pattern="SSSL"), dict(window_pattern="SL", n_layer=3, n_head=4, n_kv_head=2)])
@pytest.mark.parametrize("arm", ["dense", "cl"])
def test_the_attention_core_costs_two_matmuls_of_the_keys_in_a_window(arm, sizes):
    """What torch's counter may not see: q k and p v, 2 FLOPs each and weight, three times for forward and backward, for each key and head."""
    model = meta_model(arm, **sizes)
    head_dim = model.config.n_embd // model.config.n_head
    core = sum(3 * (2 * head_dim + 2 * head_dim) * model.config.n_head * min(left, model.config.sequence_len) for left, _ in model.window_sizes)
    short = 512 if "S" in sizes["window_pattern"] else 2048
    assert accounting.windows(model.config) == [left for left, _ in model.window_sizes] and min(accounting.windows(model.config)) == short
    routed = 0.0
    if arm == "cl":
        starts = len(accounting.boundaries(2048, 512))
        rows = sum(kind[0].routed for kind in routing.parts(model))
        routed = 2 * starts * 256 + starts / 2048 * model.config.n_layer * 4 * rows * 256
    assert accounting.flops_per_token(model.config) - 6 * accounting.matmul_params(model.config) - routed == pytest.approx(core, rel=1e-9)
