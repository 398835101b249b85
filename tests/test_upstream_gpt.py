"""
nanochat.gpt: numbers of the original (logits, losses, draws, parameter and FLOP counts), the optimizer's groups, the names
that an extension may replace, and properties that any causal model has.
"""
import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn as nn

from nanochat import gpt
from nanochat.engine import KVCache
from nanochat.gpt import GPT, GPTConfig

CONFIG_A = GPTConfig(sequence_len=32, vocab_size=97, n_layer=3, n_head=2, n_kv_head=1, n_embd=64, window_pattern="SL")
CONFIG_B = GPTConfig(sequence_len=256, vocab_size=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=32, window_pattern="SL")


def on_meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def initialised(config: GPTConfig, seed: int = 0) -> GPT:
    model = on_meta(config)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    return model


@torch.no_grad()
def wavy(config: GPTConfig) -> GPT:
    """Every weight from a formula: key number j (sorted), element i: 0.2 sin(0.7 i + 1.3 j)."""
    model = initialised(config)
    state = model.state_dict()
    for j, key in enumerate(sorted(state)):
        i = torch.arange(state[key].numel(), dtype=torch.float64)
        state[key].copy_((0.2 * torch.sin(0.7 * i + 1.3 * j)).float().view_as(state[key]))
    return model


def d(depth: int, **changes) -> GPTConfig:
    """The standard model of a depth."""
    n = 64 * depth
    heads = math.ceil(n / 128)
    return GPTConfig(**{**dict(sequence_len=2048, vocab_size=32768, n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=n), **changes})


def cache_for(config: GPTConfig, rows: int, seq_len: int) -> KVCache:
    return KVCache(rows, config.n_kv_head, seq_len, config.n_embd // config.n_head, config.n_layer, "cpu", torch.float32)


@pytest.fixture(scope="module")
def model_a() -> GPT:
    return wavy(CONFIG_A)


@pytest.fixture(scope="module")
def batch_a() -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.arange(20)
    x = torch.stack([(7 * t + 3) % 97, (11 * t + 5) % 97])
    y = x.roll(-1, dims=1)
    y[:, -1] = -1
    return x, y


def assert_near(actual: torch.Tensor, expected, tol: float) -> None:
    worst = (actual.double() - torch.as_tensor(expected, dtype=torch.float64)).abs().max().item()
    assert worst <= tol, f"largest difference {worst}"


# --- the forward pass, against the original's numbers (CPU, float32) ---

@torch.no_grad()
def test_logits_and_losses_of_a_formula_filled_model(model_a, batch_a):
    x, y = batch_a
    logits = model_a(x)
    assert logits.shape == (2, 20, 97) and logits.dtype == torch.float32
    assert logits.abs().sum().item() == pytest.approx(3096.69455, rel=1e-6)
    assert_near(logits[0, 0, :4], [-1.4008472, -1.2622113, -0.3255503, 0.8190315], 5e-6)
    assert_near(logits[1, 19, 93:], [-1.3994226, -0.8537485, 0.2344669, 1.1730013], 5e-6)
    assert model_a(x, y).item() == pytest.approx(5.1003184, abs=2e-6)
    losses = model_a(x, y, loss_reduction="none")
    assert losses.shape == (40,)
    assert_near(losses[[0, 1, 2, 19]], [4.9949784, 5.4773617, 6.0728469, 0.0], 5e-6)
    assert torch.equal(model_a(x.int()), logits), "int32 ids are as good as int64"


@torch.no_grad()
def test_logits_and_loss_with_a_window_shorter_than_the_sequence():
    model = wavy(CONFIG_B)
    t = torch.arange(256)
    x = ((7 * t + 3 * (t // 5)) % 64)[None]
    logits = model(x)
    assert model(x, x.roll(-1, dims=1)).item() == pytest.approx(4.7095227, abs=2e-6)
    assert logits.abs().sum().item() == pytest.approx(7646.02992, rel=1e-6)
    assert_near(logits[0, 255, :3], [-0.5337230, 0.8474527, -1.0213348], 5e-6)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[12] + [1] * 8, [10, 10], [1] * 20, [5, 3, 1, 7, 4], [1, 19], [20]])
def test_prefill_in_any_chunks_equals_one_forward(model_a, batch_a, chunks):
    x, _ = batch_a
    cache = cache_for(CONFIG_A, rows=2, seq_len=20)
    parts = []
    for part in x.split(chunks, dim=1):
        parts.append(model_a(part, kv_cache=cache))
        assert cache.prev_embedding.shape == (2, 1, 64)
    assert cache.get_pos() == 20
    assert_near(torch.cat(parts, dim=1), model_a(x), 1e-5)


@torch.no_grad()
def test_chunks_longer_than_a_window_agree_as_well():
    model = wavy(CONFIG_B)
    x = torch.randint(64, (1, 256), generator=torch.Generator().manual_seed(0))
    cache = cache_for(CONFIG_B, rows=1, seq_len=256)
    out = torch.cat([model(part, kv_cache=cache) for part in x.split([150, 60, 1, 45], dim=1)], dim=1)
    assert_near(out, model(x), 1e-5)


@torch.no_grad()
def test_changing_a_token_changes_no_earlier_logit_and_all_later_ones(model_a, batch_a):
    x, _ = batch_a
    for t in (0, 1, 9, 19):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 97
        before, after = model_a(x), model_a(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(dim=-1).all()


@torch.no_grad()
def test_a_single_token_is_a_sequence_too(model_a, batch_a):
    x, _ = batch_a
    assert_near(model_a(x[:, :1]), model_a(x)[:, :1], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("n_layer", [1, 2, 3, 4, 5])
def test_backout_takes_away_what_the_middle_block_gave(n_layer):
    """The fixtures above have a backout_lambda of 0."""
    model = wavy(GPTConfig(**{**vars(CONFIG_A), "n_layer": n_layer}))
    model.backout_lambda.fill_(0.7)
    outs, final = [], []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, args, out: outs.append(out))
    model.lm_head.register_forward_pre_hook(lambda module, args: final.append(args[0]))
    model(torch.arange(10)[None])
    expected = outs[-1] - 0.7 * outs[n_layer // 2]
    assert_near(final[0], expected / expected.square().mean(-1, keepdim=True).sqrt(), 1e-4)


@torch.no_grad()
def test_a_batch_without_targets_to_learn_gives_nan_and_zero_gradient():
    model = wavy(CONFIG_B)
    x = torch.arange(8)[None]
    with torch.enable_grad():
        loss = model(x, torch.full_like(x, -1))
        loss.backward()
    assert loss.isnan() and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_every_parameter_of_a_model_off_its_initial_point_gets_a_gradient(model_a, batch_a):
    model_a(*batch_a).backward()
    missing = [name for name, p in model_a.named_parameters() if p.grad is None or not p.grad.any()]
    model_a.zero_grad(set_to_none=True)
    assert missing == []


def test_forward_refuses_too_long_inputs_and_foreign_rotary_tables(batch_a):
    model = initialised(CONFIG_A)
    with pytest.raises(AssertionError, match="321 positions"):
        model(torch.zeros(1, 321, dtype=torch.long))
    model.bfloat16()
    with pytest.raises(AssertionError, match="rotary tables must be torch.float32"):
        model(batch_a[0])
    model.to("meta")
    with pytest.raises(AssertionError, match="tokens are on cpu"):
        model(batch_a[0])


# --- the parts ---

def test_rotary_embedding_turns_each_pair_by_minus_its_angle():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(1, 5, 1, 4, generator=torch.Generator().manual_seed(1)) * 6
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(torch.complex(torch.zeros_like(angle), -angle))
    assert_near(gpt.apply_rotary_emb(x, angle.cos(), angle.sin()), torch.cat([turned.real, turned.imag], dim=-1), 1e-6)
    with pytest.raises(AssertionError, match="got shape"):
        gpt.apply_rotary_emb(x[0], angle.cos(), angle.sin())


def test_norm_leaves_a_root_mean_square_of_one_in_the_dtype_of_its_input():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 7
    assert_near(gpt.norm(x).square().mean(-1), torch.ones(4), 1e-5)
    assert gpt.norm(x.bfloat16()).dtype == torch.bfloat16


def test_linear_casts_its_weight_and_never_adds_a_bias():
    linear = gpt.Linear(6, 4)
    assert linear.bias is not None
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert_near(linear(x), x @ linear.weight.detach().T, 1e-6)
    assert linear(x.bfloat16()).dtype == torch.bfloat16 and linear.weight.dtype == torch.float32


@pytest.mark.parametrize("n_layer, expected", [(1, [0]), (2, [1]), (3, [0, 2]), (4, [1, 3]), (5, [0, 2, 4])])
def test_value_embeddings_sit_on_every_other_layer_counted_from_the_last(n_layer, expected):
    assert [i for i in range(n_layer) if gpt.has_ve(i, n_layer)] == expected


@pytest.mark.parametrize("pattern, n_layer, sequence_len, left", [
    ("SSSL", 8, 2048, [512, 512, 512, 2048] * 2), ("SSSL", 6, 1024, [256, 256, 256, 1024, 256, 1024]), ("S", 3, 512, [128, 128, 512]),
    ("sl", 4, 64, [128, 64, 128, 64]), ("L", 2, 2048, [2048, 2048]), ("SLL", 1, 2048, [2048]), ("S", 2, 2052, [640, 2052])])
def test_windows_follow_the_pattern_and_the_last_layer_sees_all(pattern, n_layer, sequence_len, left):
    model = on_meta(GPTConfig(sequence_len, 64, n_layer, 1, 1, 32, pattern))
    assert model.window_sizes == [(w, 0) for w in left]


def test_impossible_configs_are_refused():
    for changes, message in [(dict(window_pattern="SXL"), "window_pattern"), (dict(n_embd=65), "n_embd 65"),
                             (dict(n_kv_head=4), "n_kv_head 4"), (dict(n_head=4, n_kv_head=3), "n_kv_head 3")]:
        with pytest.raises(AssertionError, match=message):
            on_meta(GPTConfig(**{**vars(CONFIG_A), **changes}))


def test_the_vocabulary_is_padded_aloud(capsys):
    model = on_meta(CONFIG_A)
    assert "97" in (out := capsys.readouterr().out) and "128" in out
    assert model.lm_head.weight.shape == (128, 64) and model.config.vocab_size == 97
    assert on_meta(CONFIG_B).lm_head.weight.shape == (64, 32) and capsys.readouterr().out == ""
    with torch.device("meta"):
        assert GPT(CONFIG_A, pad_vocab_size_to=100).lm_head.weight.shape == (100, 64)


# --- state dict, initial values ---

def test_state_dict_keys_shapes_and_dtypes_in_order():
    expected = [("resid_lambdas", (3,)), ("x0_lambdas", (3,)), ("smear_lambda", (1,)), ("backout_lambda", (1,)),
                ("transformer.wte.weight", (128, 64))]
    for i in range(3):
        expected += [(f"transformer.h.{i}.attn.{name}.weight", shape) for name, shape in [
            ("c_q", (64, 64)), ("c_k", (32, 64)), ("c_v", (32, 64)), ("c_proj", (64, 64))]]
        expected += [(f"transformer.h.{i}.attn.ve_gate.weight", (1, 12))] if i in (0, 2) else []
        expected += [(f"transformer.h.{i}.mlp.c_fc.weight", (256, 64)), (f"transformer.h.{i}.mlp.c_proj.weight", (64, 256))]
    expected += [("lm_head.weight", (128, 64)), ("smear_gate.weight", (1, 24)),
                 ("value_embeds.0.weight", (128, 32)), ("value_embeds.2.weight", (128, 32))]
    state = initialised(CONFIG_A).state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == expected
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("depth, tensors", [(4, 35), (6, 49), (12, 91), (20, 147), (24, 175)])
def test_number_of_parameter_tensors(depth, tensors):
    assert len(list(on_meta(d(depth)).parameters())) == tensors


def test_initial_values_are_drawn_in_the_original_s_order():
    """Exact values depend on torch's CPU generator; these are of torch 2.13, seed 42."""
    model = initialised(d(4), seed=42)
    h = model.transformer.h
    for tensor, first, std in [
            (model.transformer.wte.weight, [1.5415323, 1.1898273, 0.7205738], 0.79997),
            (model.lm_head.weight, [0.00095756, -0.00062637, -0.00103289], 0.0009998),
            (h[0].attn.c_q.weight, [0.0642904, -0.0600233, -0.0121345], 0.06243),
            (h[3].mlp.c_fc.weight, [-0.0069520, -0.0273771, -0.0023983], 0.02503),
            (model.smear_gate.weight, [0.0031399, 0.0099134, 0.0066516], None),
            (model.value_embeds["1"].weight, [-0.0299163, 0.0871852, -0.0362033], 0.06249),
            (h[3].attn.ve_gate.weight, [0.0111064, 0.0166525, 0.0196685], None)]:
        assert_near(tensor.detach().flatten()[:3], first, 2e-7)
        assert std is None or tensor.std().item() == pytest.approx(std, rel=2e-4)
    assert_near(model.resid_lambdas.detach(), [1.15, 1.1166667, 1.0833333, 1.05], 1e-6)
    assert_near(model.x0_lambdas.detach(), [0.20, 0.15, 0.10, 0.05], 1e-6)
    assert model.smear_lambda.item() == 0 and model.backout_lambda.item() == pytest.approx(0.2)
    assert not any(block.attn.c_proj.weight.any() or block.mlp.c_proj.weight.any() for block in h)
    assert model.cos.shape == model.sin.shape == (1, 20480, 1, 64)
    assert_near(model.cos[0, 1, 0, :3], [0.5403023, 0.6709088, 0.7662380], 1e-6)
    assert_near(model.sin[0, 1, 0, :3], [0.8414710, 0.7415398, 0.6425569], 1e-6)
    x = torch.randint(32768, (2, 33))
    with torch.no_grad():
        assert model(x[:, :-1], x[:, 1:]).item() == pytest.approx(math.log(32768), abs=0.01)


def test_at_initialisation_every_block_adds_exactly_nothing():
    model = initialised(CONFIG_A)
    x = torch.randn(2, 5, 64)
    ve = torch.randn(2, 5, 32)
    for block, v in zip(model.transformer.h, (ve, None, ve)):
        assert torch.equal(block(x, v, (model.cos[:, :5], model.sin[:, :5]), (32, 0), None), x)


def test_one_layer_models_have_finite_lambdas():
    model = initialised(GPTConfig(**{**vars(CONFIG_B), "n_layer": 1}))
    assert (model.resid_lambdas.item(), model.x0_lambdas.item()) == (pytest.approx(1.15), pytest.approx(0.2))


LOW_PRECISION = """
import json, torch
from nanochat.gpt import GPT, GPTConfig
from nanochat.engine import KVCache, COMPUTE_DTYPE
config = GPTConfig(sequence_len=32, vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=64, window_pattern="SL")
with torch.device("meta"):
    model = GPT(config)
model.to_empty(device="cpu")
torch.manual_seed(0)
model.init_weights()
with torch.no_grad():
    for p in model.parameters():
        p += 0.05 * torch.randn(p.shape).to(p.dtype)
    seen = set()
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, args, out: seen.add(str(out.dtype)))
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.add(str(args[0].dtype)))
    x = torch.randint(64, (2, 20))
    logits = model(x)
    cache = KVCache(2, 1, 20, 32, 3, "cpu", COMPUTE_DTYPE)
    chunked = torch.cat([model(part, kv_cache=cache) for part in x.split([11, 1, 8], dim=1)], dim=1)
print(json.dumps({"activations": sorted(seen), "logits": str(logits.dtype), "rotary": str(model.cos.dtype),
                  "state": {k: str(v.dtype) for k, v in model.state_dict().items()}, "values": logits.flatten()[:50].tolist(),
                  "cache": (logits - chunked).abs().max().item(), "kv_bytes": model.kv_bytes_per_token()}))
"""


def test_in_half_precision_activations_are_half_and_masters_are_not(capsys):
    path = os.path.dirname(os.path.dirname(gpt.__file__))
    started = {name: subprocess.Popen([sys.executable, "-c", LOW_PRECISION], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                      env={**os.environ, "NANOCHAT_DTYPE": name, "PYTHONPATH": path}) for name in ("bfloat16", "float16")}
    exec(LOW_PRECISION, {})
    runs = {"float32": json.loads(capsys.readouterr().out)}
    for name, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        runs[name] = json.loads(out)
    for name, run in runs.items():
        assert run["activations"] == [f"torch.{name}"] and run["rotary"] == f"torch.{name}" and run["logits"] == "torch.float32"
        tables = "torch.bfloat16" if name == "bfloat16" else "torch.float32"
        for key, dtype in run["state"].items():
            assert dtype == (tables if "wte" in key or "value_embeds" in key else "torch.float32"), (name, key, dtype)
        assert run["cache"] < {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[name]
        assert run["kv_bytes"] == 3 * 2 * 32 * (4 if name == "float32" else 2)
        assert_near(torch.tensor(run["values"]), runs["float32"]["values"], {"float32": 0, "bfloat16": 0.2, "float16": 0.02}[name])


# --- counting ---

def test_counts_of_the_small_model(model_a):
    assert model_a.num_matmul_params() == 143_408 and model_a.num_scaling_params()["total"] == 159_800
    assert model_a.estimate_flops() == 934_176
    assert model_a.estimate_decode_flops(10) == 294_496
    assert model_a.estimate_prefill_flops(20) == 5_897_600
    assert model_a.kv_bytes_per_token() == 768
    assert model_a.kv_read_bytes(40) == 26_624
    assert model_a.get_device() == torch.device("cpu")


@pytest.mark.parametrize("depth, wte, value_embeds, matrices, scalars, total, scaling", [
    (4, 8_388_608, 16_777_216, 3_145_776, 34, 36_700_242, 11_534_384),
    (6, 12_582_912, 37_748_736, 10_616_940, 38, 73_531_538, 23_199_852),
    (8, None, None, None, None, 125_829_354, 41_943_232),
    (12, 25_165_824, 150_994_944, 84_935_088, 50, 286_261_730, 110_100_912),
    (16, None, None, None, None, 536_871_738, 234_881_792),
    (20, 41_943_040, 419_430_400, 393_217_200, 66, 896_533_746, 435_160_240),
    (24, 50_331_648, 603_979_776, 679_478_976, 74, 1_384_122_122, 729_810_624),
    (26, None, None, None, None, 1_681_786_938, 918_423_532),
    (32, None, None, None, None, 2_818_575_450, 1_677_724_672)])
def test_parameters_of_the_standard_models(depth, wte, value_embeds, matrices, scalars, total, scaling):
    counts = on_meta(d(depth)).num_scaling_params()
    assert list(counts) == ["wte", "value_embeds", "lm_head", "transformer_matrices", "scalars", "total"]
    assert (counts["total"], counts["transformer_matrices"] + counts["lm_head"]) == (total, scaling)
    if wte is not None:
        assert list(counts.values()) == [wte, value_embeds, wte, matrices, scalars, total]


@pytest.mark.parametrize("depth, matmul, flops, flops_full, kv_bytes", [
    (4, 11_534_408, 80_216_496, None, 4_096), (6, 23_199_876, 167_510_808, None, 9_216), (8, None, 295_699_728, None, None),
    (12, 110_100_936, 759_696_048, 887_098_032, 36_864), (16, None, 1_585_451_664, None, None),
    (20, 435_160_264, 2_886_212_784, 3_240_107_184, 102_400), (24, 729_810_648, 4_775_225_616, 5_284_833_552, 147_456),
    (26, None, 5_991_051_288, None, None), (32, None, 10_770_991_248, None, None)])
def test_flops_and_cache_bytes_of_the_standard_models(monkeypatch, depth, matmul, flops, flops_full, kv_bytes):
    model = on_meta(d(depth))
    assert model.estimate_flops() == flops
    assert matmul is None or model.num_matmul_params() == matmul
    assert flops_full is None or on_meta(d(depth, window_pattern="L")).estimate_flops() == flops_full
    monkeypatch.setattr(gpt, "COMPUTE_DTYPE", torch.bfloat16)
    assert kv_bytes is None or model.kv_bytes_per_token() == kv_bytes


@pytest.mark.parametrize("num_tokens", [1, 20, 128, 129, 300])
def test_prefill_costs_what_its_tokens_cost_one_by_one(num_tokens):
    """Decoding after t tokens is priced at min(t, window) keys, so the prompt's tokens see 1, 2, ... num_tokens."""
    model = on_meta(CONFIG_B)
    assert model.estimate_prefill_flops(num_tokens) == sum(model.estimate_decode_flops(t + 1) for t in range(num_tokens))


def test_linears_of_another_class_still_count():
    """As after the conversion to fp8, whose linears derive from nn.Linear only."""
    class OtherLinear(nn.Linear):
        pass

    model = on_meta(d(4))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.in_features % 16 == 0:
                other = OtherLinear(child.in_features, child.out_features, bias=False, device="meta")
                setattr(module, name, other)
    assert sum(isinstance(m, OtherLinear) for m in model.modules()) == 4 * 6 + 1
    assert model.estimate_flops() == 80_216_496 and model.num_matmul_params() == 11_534_408


def test_a_parameter_without_a_role_is_noticed():
    model = on_meta(CONFIG_A)
    model.extra = nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.raises(AssertionError, match="159,800, the model has 159,803"):
        model.num_scaling_params()
    with pytest.raises(AssertionError, match="29 parameter tensors .* 30"):
        model.setup_optimizer()


# --- the optimizer ---

def test_optimizer_groups_of_the_standard_model(capsys):
    model = on_meta(d(6))  # width 384: factor sqrt(2)
    groups = model.setup_optimizer(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.03, weight_decay=0.28, scalar_lr=0.5).param_groups
    assert "1.414214" in capsys.readouterr().out
    names = {id(p): name for name, p in model.named_parameters()}
    members = [[names[id(p)] for p in group["params"]] for group in groups]
    h = [f"transformer.h.{i}." for i in range(6)]
    assert members == [
        ["lm_head.weight"], ["transformer.wte.weight"], [f"value_embeds.{i}.weight" for i in (1, 3, 5)], ["resid_lambdas"], ["x0_lambdas"],
        ["smear_gate.weight", "smear_lambda", "backout_lambda"],
        [h[i] + "attn.ve_gate.weight" for i in (1, 3, 5)],
        [block + f"attn.{name}.weight" for block in h for name in ("c_q", "c_k", "c_v", "c_proj")],
        [block + "mlp.c_proj.weight" for block in h], [block + "mlp.c_fc.weight" for block in h]]
    root2 = 2 ** 0.5
    for group, lr, betas, weight_decay in zip(groups, [0.008 * root2, 0.3 * root2, 0.15 * root2, 0.005, 0.5, 0.2],
                                              [(0.8, 0.96), (0.8, 0.995), (0.8, 0.995), (0.8, 0.95), (0.96, 0.95), (0.8, 0.95)],
                                              [0.01, 0.001, 0.01, 0.05, 0.0, 0.0]):
        assert {k: v for k, v in group.items() if k != "params"} == dict(
            kind="adamw", lr=pytest.approx(lr), initial_lr=pytest.approx(lr), betas=betas, eps=1e-10, weight_decay=weight_decay)
    for group in groups[6:]:
        assert {k: v for k, v in group.items() if k != "params"} == dict(
            kind="muon", lr=0.03, initial_lr=0.03, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.28)


def test_optimizer_defaults_and_grouping_with_fewer_key_value_heads():
    model = on_meta(GPTConfig(**{**vars(CONFIG_A), "n_embd": 768, "n_head": 6, "n_kv_head": 2}))
    groups = model.setup_optimizer().param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.004, 0.2, 0.1, 0.005, 0.5, 0.2] + [0.02] * 5)
    assert [tuple(group["params"][0].shape) for group in groups[6:]] == [(2, 12), (256, 768), (768, 768), (768, 3072), (3072, 768)]
    assert all(len({tuple(p.shape) for p in group["params"]}) == 1 for group in groups[6:])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["weight_decay"] for group in groups[6:]} == {0.0}


# --- names that an extension may replace at any time ---

def test_layers_are_built_from_the_module_s_current_names(monkeypatch):
    built = Counter()
    for name in ("Block", "CausalSelfAttention", "MLP", "Linear"):
        original = getattr(gpt, name)

        def make(*args, original=original, name=name, **kwargs):
            built[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(gpt, name, make)
    said = []
    monkeypatch.setattr(gpt, "print0", said.append)
    monkeypatch.setattr(gpt, "has_ve", lambda layer_idx, n_layer: layer_idx == 1)
    model = on_meta(CONFIG_A)
    assert built == {"Block": 3, "CausalSelfAttention": 3, "MLP": 3, "Linear": 3 * (4 + 2) + 1 + 2}
    assert list(model.value_embeds) == ["1"] and [b.attn.ve_gate is None for b in model.transformer.h] == [True, False, True]
    assert len(said) == 1


@torch.no_grad()
def test_the_forward_pass_looks_its_functions_up_at_call_time(monkeypatch, batch_a):
    model = wavy(CONFIG_A)
    x, _ = batch_a
    calls = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    count(gpt, "norm")
    count(gpt, "apply_rotary_emb")
    count(gpt.flash_attn, "flash_attn_func")
    count(gpt.flash_attn, "flash_attn_with_kvcache")
    model(x)
    assert calls == {"norm": 2 + 3 * 4, "apply_rotary_emb": 6, "flash_attn_func": 3}
    calls.clear()
    model(x, kv_cache=cache_for(CONFIG_A, 2, 20))
    assert calls == {"norm": 2 + 3 * 4, "apply_rotary_emb": 6, "flash_attn_with_kvcache": 3}


def test_the_optimizer_is_made_by_the_module_s_current_class(monkeypatch):
    monkeypatch.setattr(gpt, "MuonAdamW", lambda groups: ("mine", len(groups)))
    assert on_meta(CONFIG_A).setup_optimizer() == ("mine", 6 + 5)


def test_a_replaced_mlp_gets_the_config_alone_and_is_used(monkeypatch, batch_a):
    class Doubling(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.c_fc, self.c_proj = gpt.Linear(config.n_embd, 8, bias=False), gpt.Linear(8, config.n_embd, bias=False)

        def forward(self, x):
            return 2 * self.c_proj(self.c_fc(x))

    monkeypatch.setattr(gpt, "MLP", Doubling)
    model = initialised(CONFIG_A)
    assert all(isinstance(block.mlp, Doubling) for block in model.transformer.h)
    assert model(batch_a[0]).isfinite().all()
    assert model.num_scaling_params()["transformer_matrices"] == 135_192 - 3 * 2 * (256 - 8) * 64


# --- generating ---

def test_greedy_generation_takes_the_most_likely_token_of_a_full_forward_each_time(model_a):
    tokens = [3, 14, 15]
    expected = list(tokens)
    with torch.no_grad():
        for _ in range(12):
            expected.append(model_a(torch.tensor([expected]))[0, -1].argmax().item())
    out = model_a.generate(tokens, 12, temperature=0)
    assert list(out) == expected[3:] and tokens == [3, 14, 15]
    assert list(model_a.generate([5], 3, temperature=0)) == list(model_a.generate([5], 3, temperature=0))
    assert list(model_a.generate(tokens, 0)) == []


def test_sampling_repeats_with_the_seed_and_leaves_the_global_generator_alone(model_a):
    state = torch.get_rng_state()
    runs = [list(model_a.generate([3, 14], 30, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert all(isinstance(t, int) and 0 <= t < 97 for t in runs[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_samples_only_from_the_k_most_likely(model_a):
    prompt = [3, 14]
    with torch.no_grad():
        best = set(model_a(torch.tensor([prompt]))[0, -1].topk(5).indices.tolist())
    first = {next(model_a.generate(prompt, 1, temperature=3.0, top_k=5, seed=seed)) for seed in range(60)}
    assert first == best, "all five and no other in sixty draws"
    assert list(model_a.generate(prompt, 8, top_k=1)) == list(model_a.generate(prompt, 8, temperature=0))
    assert len(list(model_a.generate(prompt, 2, top_k=10_000))) == 2


def test_sampling_follows_the_softmax_of_the_logits(model_a):
    prompt, draws = [3, 14], 600
    with torch.no_grad():
        p = torch.softmax(model_a(torch.tensor([prompt]))[0, -1] / 0.5, dim=-1)
    seen = torch.zeros(97)
    for seed in range(draws):
        seen[next(model_a.generate(prompt, 1, temperature=0.5, seed=seed))] += 1
    error = (seen / draws - p).abs()
    assert (error < 4.5 * (p / draws).sqrt() + 1 / draws).all(), f"largest deviation {error.max()}"
