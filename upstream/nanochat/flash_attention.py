"""
Causal attention with a sliding window: FlashAttention-3 where the GPU has it, else PyTorch's scaled_dot_product_attention.

B rows, T positions, H query heads, Hkv key/value heads, D head dim. With a left window w a query at i sees keys i-w ... i.
Other modules import the namespace `flash_attn`; its two functions take the arguments of the FA3 package.
"""
import os
import threading
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F

from nanochat.common import COMPUTE_DTYPE

PROBE_LIMIT_S = 300  # the kernel is fetched from the network once; without one the hub client may wait for minutes


def _fetch_fa3() -> ModuleType | None:
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from kernels import get_kernel, has_kernel
    if torch.cuda.get_device_capability()[0] == 9:
        return get_kernel("varunneal/flash-attention-3").flash_attn_interface
    name = "kernels-community/flash-attn3"
    return get_kernel(name).flash_attn_interface if has_kernel(name) else None


def _probe_fa3() -> ModuleType | None:
    """The FA3 interface, or None: no CUDA, no build for this GPU, no network, or anything else that goes wrong or takes too long."""
    if not torch.cuda.is_available():
        return None
    found = []

    def attempt() -> None:
        with suppress(Exception):
            found.append(_fetch_fa3())

    worker = threading.Thread(target=attempt, daemon=True)
    worker.start()
    worker.join(PROBE_LIMIT_S)
    return found[0] if found else None


_fa3 = _probe_fa3()
HAS_FA3 = _fa3 is not None
_override_impl = None  # None: choose; "fa3" or "sdpa": insist. Then assign USE_FA3 = _resolve_use_fa3()


def _resolve_use_fa3() -> bool:
    if _override_impl == "fa3":
        assert HAS_FA3, "FlashAttention-3 was asked for but is not available here"
        return True
    return _override_impl != "sdpa" and HAS_FA3 and COMPUTE_DTYPE == torch.bfloat16


USE_FA3 = _resolve_use_fa3()


def _sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:
    """q (B,H,Tq,D), k and v (B,Hkv,Tk,D); the queries are the last Tq of the Tk positions."""
    Tq, Tk, window = q.size(2), k.size(2), window_size[0]
    if Tq == Tk and not 0 <= window < Tq:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
    if Tq == 1:
        first = max(Tk - 1 - window, 0) if window >= 0 else 0
        return F.scaled_dot_product_attention(q, k[:, :, first:], v[:, :, first:], enable_gqa=enable_gqa)
    i = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    j = torch.arange(Tk, device=q.device)[None, :]
    mask = j <= i
    if 0 <= window < Tk:
        mask &= i - j <= window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """The same with positions before heads: q (B,Tq,H,D), k and v (B,Tk,Hkv,D) -> (B,Tq,H,D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return _sdpa_attention(q, k, v, window_size, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False,
                    window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """Attention of a whole sequence to itself: q (B,T,H,D), k and v (B,T,Hkv,D) -> (B,T,H,D). SDPA is always causal."""
    if USE_FA3:
        return _fa3.flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    return _sdpa(q, k, v, window_size)


def flash_attn_with_kvcache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None = None,
                            v: torch.Tensor | None = None, cache_seqlens: torch.Tensor | None = None, causal: bool = False,
                            window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """
    New queries q (B,Tnew,H,D) attend to the caches (B,Tmax,Hkv,D), into which the new k and v (B,Tnew,Hkv,D) are first written at
    position `cache_seqlens` (B,) int32 (one position for all rows, not advanced here). ValueError when they do not fit.
    """
    if USE_FA3:
        return _fa3.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, causal=causal,
                                            window_size=window_size)
    pos = cache_seqlens[0].item()
    end = pos + q.size(1)
    if end > k_cache.size(1):  # upstream drops a single token past the end without a word
        raise ValueError(f"the KV cache holds {k_cache.size(1)} positions, {pos} are taken and {q.size(1)} more do not fit; make it longer")
    if k is not None and v is not None:
        k_cache[:, pos:end] = k
        v_cache[:, pos:end] = v
    return _sdpa(q, k_cache[:, :end], v_cache[:, :end], window_size)


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
