"""What only a GPU can run: these tests run by themselves where there is one, and are skipped elsewhere."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from test_upstream_base_train import TINY, base_dir, use  # noqa: F401  base_dir is a fixture
from test_upstream_fp8 import reference
from test_upstream_gpt import CONFIG_A, wavy
from test_upstream_optim import adamw, muon, parameter, rank_gradient, sharded_model

from nanochat import flash_attention, fp8
from nanochat.common import COMPUTE_DTYPE
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as batches
from nanochat.engine import KVCache
from nanochat.fp8 import Float8Linear
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import get_tokenizer
from nanochat_cl.upstream import tree

DEVICE, BACKEND = "cuda", "nccl"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_fa3 = pytest.mark.skipif(not flash_attention.HAS_FA3, reason="Flash Attention 3 is not available")
needs_fp8 = pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8 in hardware")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


# --- attention --------------------------------------------------------------------------------------------------------

@pytest.fixture
def implementation(monkeypatch):
    def choose(name: str) -> None:
        monkeypatch.setattr(flash_attention, "_override_impl", name)
        monkeypatch.setattr(flash_attention, "USE_FA3", flash_attention._resolve_use_fa3())
    return choose


def explicit(q, k, v, window: int):
    """Masked softmax attention in float64 on the CPU; the queries are the last positions of the keys."""
    q, k, v = (x.detach().cpu().double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    i = torch.arange(k.size(2) - q.size(2), k.size(2))[:, None]
    j = torch.arange(k.size(2))
    mask = (j <= i) & (i - j <= (window if window >= 0 else k.size(2)))
    return ((q @ k.mT / q.size(-1) ** 0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def tensors(T: int, kv_heads: int):
    generator = torch.Generator().manual_seed(T + kv_heads)
    draw = lambda heads: torch.randn(2, T, heads, 64, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    return [draw(heads) for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("name", ["sdpa", pytest.param("fa3", marks=needs_fa3)])
@pytest.mark.parametrize("T, kv_heads, window", [(64, 4, -1), (256, 4, 64), (256, 2, 64), (200, 1, 200), (512, 4, 128)])
def test_attention_on_the_gpu_is_the_explicit_one(implementation, name, T, kv_heads, window):
    implementation(name)
    q, k, v = tensors(T, kv_heads)
    out = flash_attention.flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    torch.testing.assert_close(out.cpu().double(), explicit(q, k, v, window), atol=2e-2, rtol=2e-2)


@needs_fa3
@pytest.mark.parametrize("kv_heads, window", [(4, -1), (2, 64)])
def test_both_implementations_have_the_same_gradients(implementation, kv_heads, window):
    grads = []
    for name in ("sdpa", "fa3"):
        implementation(name)
        q, k, v = tensors(256, kv_heads)
        flash_attention.flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0)).float().square().sum().backward()
        grads.append([q.grad, k.grad, v.grad])
    for sdpa, fa3 in zip(*grads):
        torch.testing.assert_close(fa3, sdpa, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("name", ["sdpa", pytest.param("fa3", marks=needs_fa3)])
@pytest.mark.parametrize("window", [-1, 32])
def test_prefill_and_single_tokens_through_the_cache_equal_the_whole(implementation, name, window):
    implementation(name)
    q, k, v = (x.detach() for x in tensors(96, 2))
    k_cache, v_cache = (torch.zeros(2, 128, 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    parts, start = [], 0
    for size in (80, *[1] * 16):
        part = slice(start, start + size)
        parts.append(flash_attention.flash_attn.flash_attn_with_kvcache(
            q[:, part], k_cache, v_cache, k=k[:, part], v=v[:, part], causal=True, window_size=(window, 0),
            cache_seqlens=torch.full((2,), start, dtype=torch.int32, device=DEVICE)))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1).cpu().double(), explicit(q, k, v, window), atol=2e-2, rtol=2e-2)


# --- model, optimizer, FP8 --------------------------------------------------------------------------------------------

@torch.no_grad()
def test_decoding_on_the_gpu_agrees_with_the_full_forward_and_with_the_recorded_sum():
    model = wavy(CONFIG_A).to(DEVICE)
    ids = torch.tensor([[(7 * t + 3) % 97 for t in range(20)], [(11 * t + 5) % 97 for t in range(20)]], device=DEVICE)
    whole = model(ids)
    assert whole.dtype == torch.float32 and whole.abs().sum().item() == pytest.approx(3096.69455, rel=0.02), "specification 26.1"
    cache = KVCache(2, CONFIG_A.n_kv_head, 20, CONFIG_A.n_embd // CONFIG_A.n_head, CONFIG_A.n_layer, DEVICE, COMPUTE_DTYPE)
    parts = [model(chunk, kv_cache=cache) for chunk in ids.split([12, 4, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=0.15, rtol=0)  # bfloat16 logits of up to 15


def test_optimizer_steps_on_the_gpu_repeat_to_the_bit_and_stay_close_to_the_cpu_s():
    results = []
    shapes = [(64, 32), (6, 5), (8, 6), (8, 6), (6, 8)]
    for device in (DEVICE, DEVICE, "cpu"):
        params = [nn.Parameter(parameter(shape, 0.7, k, 0.5).detach().to(device)) for k, shape in enumerate(shapes)]
        optimizer = MuonAdamW([adamw(params[:1]), adamw(params[1:2]), muon(params[2:4]), muon(params[4:])])
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = rank_gradient(p.cpu(), k, step, 0).to(device)
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    for k, (first, again, cpu) in enumerate(zip(*results)):
        assert torch.equal(first, again), f"parameter {k}"
        torch.testing.assert_close(first, cpu, atol=1e-5 if k < 2 else 5e-3, rtol=0)  # Muon multiplies in bfloat16


@needs_fp8
@pytest.mark.parametrize("compiled", [False, True])
def test_the_three_fp8_products_on_the_gpu_are_those_of_the_quantised_tensors(compiled, monkeypatch):
    monkeypatch.setattr(fp8, "COMPUTE_DTYPE", torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    layer = Float8Linear(64, 128, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(128, 64, generator=generator))
    x = torch.randn(4, 16, 64, generator=generator).bfloat16()
    grad = (torch.randn(4, 16, 128, generator=generator) * 1e-3).bfloat16()
    expected = reference(x.float().reshape(64, 64), layer.weight.detach(), grad.float().reshape(64, 128))
    layer = layer.to(DEVICE)
    x = x.to(DEVICE).requires_grad_()
    out = (torch.compile(layer) if compiled else layer)(x)
    out.backward(grad.to(DEVICE))
    assert out.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    for got, want in zip([out.reshape(64, 128), x.grad.reshape(64, 64), layer.weight.grad], expected):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


# --- data -------------------------------------------------------------------------------------------------------------

def test_batches_arrive_intact_while_the_gpu_is_busy(base_dir, monkeypatch):  # noqa: F811
    """Their copies are asynchronous: with the device held up, later batches must not overwrite earlier ones on their way."""
    use(base_dir, monkeypatch)
    there, here = (batches(get_tokenizer(), 4, 64, "train", device=device) for device in (torch.device(DEVICE), "cpu"))
    received = []
    for _ in range(20):
        if DEVICE == "cuda":
            torch.cuda._sleep(20_000_000)  # cycles
        received.append(next(there)[:2])
    for (x, y), (inputs, targets, _) in zip(received, here):
        assert x.device.type == DEVICE and torch.equal(x.cpu(), inputs) and torch.equal(y.cpu(), targets)
    there.close()
    here.close()


# --- whole runs -------------------------------------------------------------------------------------------------------

def run_training(base, tag: str, *flags: str, ranks: int = 0) -> str:
    python = [sys.executable, "-m", *(["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks else [])]
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(tree())}
    env.pop("NANOCHAT_DTYPE", None)
    command = [*python, "scripts.base_train", *(["--"] if ranks else []), *TINY, f"--device-type={DEVICE}", "--aspect-ratio=64",
               "--head-dim=64"]
    result = subprocess.run([*command, f"--model-tag={tag}", *flags], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def bpbs(out: str) -> list[float]:
    return [float(x) for x in re.findall(r"Validation bpb: ([\d.]+)", out)]


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=needs_two)])
def test_a_run_on_gpus_learns_and_resumes_with_the_very_next_batch(base_dir, ranks):  # noqa: F811
    tag = f"gpu{ranks}"
    out = run_training(base_dir, tag, "--sample-every=6", ranks=ranks)
    assert re.search(r"^GPU: .+ \| Peak FLOPS \(BF16\): ", out, re.MULTILINE) or DEVICE == "cpu"
    assert len(bpbs(out)) == 3 and bpbs(out)[-1] < bpbs(out)[0]
    folder = base_dir / "base_checkpoints" / tag
    assert len(list(folder.glob("optim_000004_rank*.pt"))) == max(ranks, 1)
    weights = torch.load(folder / "model_000006.pt", weights_only=True)
    assert f"COMPUTE_DTYPE: {weights['transformer.wte.weight'].dtype} (" in out and weights["lm_head.weight"].dtype == torch.float32
    again = base_dir / "base_checkpoints" / f"{tag}again"
    again.mkdir()
    for path in folder.glob("*000004*"):
        shutil.copy(path, again)
    resumed = run_training(base_dir, again.name, "--resume-from-step=4", ranks=ranks)
    assert "with the very next batch" in resumed and bpbs(resumed)[-1] == pytest.approx(bpbs(out)[-1], abs=5e-3)


@needs_fp8
def test_a_run_with_fp8_counts_the_same_flops_and_learns(base_dir):  # noqa: F811
    wide = ["--aspect-ratio=128", "--head-dim=128", "--device-batch-size=4", "--save-every=-1"]
    plain, with_fp8 = (run_training(base_dir, "wide", *wide, *flags) for flags in ([], ["--fp8"]))
    count = lambda out: re.search(r"FLOPs per token: (\S+)", out)[1]
    assert count(plain) == count(with_fp8) and "FP8: converted 13 linear layers" in with_fp8  # six per block, and lm_head
    assert bpbs(with_fp8)[-1] < bpbs(with_fp8)[0] and bpbs(with_fp8)[-1] == pytest.approx(bpbs(plain)[-1], rel=0.05)


def run_rank(rank: int, address: str, out: str) -> None:
    device = torch.device(DEVICE, rank if DEVICE == "cuda" else None)
    if DEVICE == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(BACKEND, init_method=f"file://{address}", rank=rank, world_size=2)
    params, optimizer = sharded_model()
    for p in params:
        p.data = p.data.to(device)
    for step in range(3):
        for k, p in enumerate(params):
            p.grad = rank_gradient(p.cpu(), k, step, rank).to(device)
        optimizer.step()
    torch.save([p.detach().cpu() for p in params], f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@needs_two
def test_two_nccl_ranks_equal_one_rank_on_the_averaged_gradient(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    params, optimizer = sharded_model()
    for p in params:
        p.data = p.data.to(DEVICE)
    for step in range(3):
        for k, p in enumerate(params):
            p.grad = ((rank_gradient(p.cpu(), k, step, 0) + rank_gradient(p.cpu(), k, step, 1)) / 2).to(DEVICE)
        optimizer.step()
    for k, p in enumerate(params):
        assert torch.equal(ranks[0][k], ranks[1][k]), f"parameter {k} differs between the ranks"
        torch.testing.assert_close(ranks[0][k], p.detach().cpu(), atol=2e-6 if k < 2 else 5e-3, rtol=0)
