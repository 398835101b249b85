"""nanochat.flash_attention: the SDPA path against an explicit loop, the cache, the choice of implementation and the probe."""
import sys
import threading
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import flash_attention as fa


def naive(q, k, v, window: int):
    """Query by query: q (B,Tq,H,D) are the last positions of k, v (B,Tk,Hkv,D); float64."""
    q, k, v = q.double(), k.double(), v.double()
    B, Tq, H, D = q.shape
    Tk, group = k.size(1), H // k.size(2)
    out = torch.zeros(B, Tq, H, D, dtype=torch.float64)
    for h in range(H):
        for t in range(Tq):
            i = Tk - Tq + t
            first = max(i - window, 0) if window >= 0 else 0
            keys, values = k[:, first:i + 1, h // group], v[:, first:i + 1, h // group]
            weights = torch.softmax((keys @ q[:, t, h, :, None])[..., 0] / D ** 0.5, dim=-1)
            out[:, t, h] = (weights[..., None] * values).sum(1)
    return out


def tensors(seed: int, *shapes):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def assert_close(actual, expected, tol=2e-6):
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst < tol, f"largest difference {worst}"


heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)])


@settings(max_examples=80, deadline=None)
@given(T=st.integers(1, 20), heads=heads, window=st.integers(-1, 25), seed=st.integers(0, 1000))
def test_a_whole_sequence_equals_the_loop_for_any_window_and_grouping(T, heads, window, seed):
    H, Hkv = heads
    q, k, v = tensors(seed, (2, T, H, 8), (2, T, Hkv, 8), (2, T, Hkv, 8))
    out = fa.flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    assert out.shape == (2, T, H, 8)
    assert_close(out, naive(q, k, v, window))


@settings(max_examples=80, deadline=None)
@given(chunks=st.lists(st.integers(1, 7), min_size=1, max_size=5), heads=heads, window=st.integers(-1, 25), seed=st.integers(0, 1000),
       spare=st.integers(0, 3))
def test_chunks_through_the_cache_equal_the_loop_over_the_whole(chunks, heads, window, seed, spare):
    H, Hkv = heads
    T = sum(chunks)
    q, k, v = tensors(seed, (2, T, H, 8), (2, T, Hkv, 8), (2, T, Hkv, 8))
    k_cache, v_cache = torch.full((2, 2, T + spare, Hkv, 8), 1e6)  # what is not written yet must not be seen
    seqlens = torch.zeros(2, dtype=torch.int32)
    outs = []
    for size in chunks:
        pos = seqlens[0].item()
        new = slice(pos, pos + size)
        outs.append(fa.flash_attn.flash_attn_with_kvcache(q[:, new], k_cache, v_cache, k=k[:, new], v=v[:, new], cache_seqlens=seqlens,
                                                          causal=True, window_size=(window, 0)))
        assert seqlens.tolist() == [pos, pos], "the caller advances the position"
        seqlens += size
    assert_close(torch.cat(outs, dim=1), naive(q, k, v, window))
    assert torch.equal(k_cache[:, :T], k) and torch.equal(v_cache[:, :T], v), "the cache holds the keys and values"
    assert (k_cache[:, T:] == 1e6).all(), "and nothing else was touched"


def test_the_window_counts_its_own_position_and_w_before():
    """Values are one-hot positions and keys are equal, so the output is the average over the visible positions."""
    T, w = 9, 3
    v = torch.eye(T)[None, :, None, :]
    q = k = torch.zeros(1, T, 1, T)
    out = fa.flash_attn_func(q, k, v, causal=True, window_size=(w, 0))[0, :, 0]
    for i in range(T):
        visible = [j for j in range(T) if out[i, j] > 0]
        assert visible == list(range(max(0, i - w), i + 1))


def test_sdpa_is_causal_whatever_is_asked():
    q, k, v = tensors(0, (1, 6, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4))
    assert torch.equal(fa.flash_attn_func(q, k, v), fa.flash_attn_func(q, k, v, causal=True, window_size=(-1, -1)))
    assert_close(fa.flash_attn_func(q, k, v), naive(q, k, v, -1))


def test_gradients_reach_queries_keys_and_values_and_equal_the_loop_s():
    q, k, v = (t.requires_grad_() for t in tensors(1, (2, 12, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8)))
    weight = tensors(2, (2, 12, 4, 8))[0]
    fast = torch.autograd.grad((fa.flash_attn_func(q, k, v, causal=True, window_size=(5, 0)) * weight).sum(), (q, k, v))
    slow = torch.autograd.grad((naive(q, k, v, 5) * weight).sum(), (q, k, v))
    for a, b in zip(fast, slow):
        assert_close(a, b, 1e-5)


def test_without_new_keys_the_cache_is_read_up_to_the_queries():
    q, k, v = tensors(3, (1, 2, 1, 4), (1, 8, 1, 4), (1, 8, 1, 4))
    before = k.clone()
    out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.tensor([4], dtype=torch.int32))
    assert_close(out, naive(q, k[:, :6], v[:, :6], -1))
    assert torch.equal(k, before)


@pytest.mark.parametrize("taken, new", [(8, 1), (7, 2), (0, 9)])
def test_what_does_not_fit_into_the_cache_is_an_error_not_a_loss(taken, new):
    q, k, v = tensors(4, (1, new, 1, 4), (1, new, 1, 4), (1, new, 1, 4))
    k_cache, v_cache = torch.zeros(2, 1, 8, 1, 4)
    with pytest.raises(ValueError, match=f"holds 8 positions, {taken} are taken and {new} more"):
        fa.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=torch.tensor([taken], dtype=torch.int32))
    assert not k_cache.any() and not v_cache.any()


# --- FA3 or SDPA ---

@pytest.fixture
def fake_fa3(monkeypatch):
    """FA3 "installed": a module that returns what it was called with."""
    module = types.SimpleNamespace(flash_attn_func=lambda *a, **kw: ("whole", a, kw),
                                   flash_attn_with_kvcache=lambda *a, **kw: ("cached", a, kw))
    monkeypatch.setattr(fa, "_fa3", module)
    monkeypatch.setattr(fa, "HAS_FA3", True)
    return module


def test_the_choice_needs_the_kernel_and_bfloat16_and_can_be_overridden(monkeypatch, fake_fa3):
    monkeypatch.setattr(fa, "_override_impl", None)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        monkeypatch.setattr(fa, "COMPUTE_DTYPE", dtype)
        assert fa._resolve_use_fa3() is (dtype == torch.bfloat16)
    monkeypatch.setattr(fa, "_override_impl", "fa3")
    assert fa._resolve_use_fa3() is True  # in float32 as well
    monkeypatch.setattr(fa, "_override_impl", "sdpa")
    monkeypatch.setattr(fa, "COMPUTE_DTYPE", torch.bfloat16)
    assert fa._resolve_use_fa3() is False
    monkeypatch.setattr(fa, "HAS_FA3", False)
    monkeypatch.setattr(fa, "_override_impl", None)
    assert fa._resolve_use_fa3() is False
    monkeypatch.setattr(fa, "_override_impl", "fa3")
    with pytest.raises(AssertionError, match="FlashAttention-3"):
        fa._resolve_use_fa3()


def test_with_fa3_everything_is_handed_on_as_it_is(monkeypatch, fake_fa3):
    monkeypatch.setattr(fa, "USE_FA3", True)
    kind, args, kwargs = fa.flash_attn.flash_attn_func(1, 2, 3, causal=True, window_size=(4, 0))
    assert (kind, args, kwargs) == ("whole", (1, 2, 3), dict(causal=True, window_size=(4, 0)))
    kind, args, kwargs = fa.flash_attn.flash_attn_with_kvcache(1, 2, 3, k=4, v=5, cache_seqlens=6, causal=True, window_size=(7, 0))
    assert (kind, args, kwargs) == ("cached", (1, 2, 3), dict(k=4, v=5, cache_seqlens=6, causal=True, window_size=(7, 0)))


# --- the probe ---

@pytest.fixture
def hub(monkeypatch):
    """Pretends a GPU and the `kernels` package; `hub.kernels` may be changed, `hub.fetched` lists what was asked for."""
    state = types.SimpleNamespace(capability=(9, 0), fetched=[])

    def get_kernel(name):
        state.fetched.append(name)
        return types.SimpleNamespace(flash_attn_interface=f"interface of {name}")

    state.kernels = types.SimpleNamespace(get_kernel=get_kernel, has_kernel=lambda name: True)
    monkeypatch.setitem(sys.modules, "kernels", state.kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: state.capability)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    return state


def test_hopper_and_other_gpus_get_different_builds(hub):
    assert fa._probe_fa3() == "interface of varunneal/flash-attention-3"
    for hub.capability in ((8, 0), (10, 0)):
        assert fa._probe_fa3() == "interface of kernels-community/flash-attn3"
    hub.kernels.has_kernel = lambda name: False
    assert fa._probe_fa3() is None
    assert len(hub.fetched) == 3


def test_without_cuda_nothing_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fa._probe_fa3() is None and hub.fetched == []


def test_a_failing_missing_or_hanging_hub_means_no_fa3(hub, monkeypatch):
    def refuse(name):
        raise OSError("no network")

    hub.kernels.get_kernel = refuse
    assert fa._probe_fa3() is None
    answered = threading.Event()
    hub.kernels.get_kernel = lambda name: answered.wait()
    monkeypatch.setattr(fa, "PROBE_LIMIT_S", 0.05)
    assert fa._probe_fa3() is None
    answered.set()
    monkeypatch.setitem(sys.modules, "kernels", None)  # makes the import fail
    monkeypatch.setattr(fa, "PROBE_LIMIT_S", 300)
    assert fa._probe_fa3() is None
