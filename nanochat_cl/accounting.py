"""
Parameters and FLOPs of a model in closed form, from its config alone: the ledger of a run, and the arithmetic of a fair comparison.

Conventions are nanochat's: a matmul weight costs 6 FLOPs per token (forward and backward), a key in a layer's window 12 n_embd,
no discount for the causal mask. For a dense config the figures equal `GPT.estimate_flops` and the model's own parameter count.
Only what works for a token is counted: blocks that were not chosen are not, nor the copying and adding that a backend does.

L layers, n width, D head dim, Hkv key/value heads, Vp padded vocabulary, G blocks of width b, S shared, R = G - S routed, k active.
"""
import math
from collections.abc import Mapping
from typing import Any

PAD_VOCAB = 64           # as GPT's pad_vocab_size_to
GATE, SMEAR = 12, 24     # inputs of a value embedding's gate and of the smear gate
FIRST_CHUNK = 16         # positions that are routed by a learned constant, unless chunks are shorter: nothing was read yet
ROUTER_ROWS = 8          # a router has a multiple of this many rows, see routing.Routed


def boundaries(end: int, chunk: int) -> list[int]:
    """Starts of the chunks below `end`: 0, 16 and its doublings below `chunk`, then the multiples of `chunk`."""
    starts, start = [0], FIRST_CHUNK
    while start < min(chunk, end):
        starts, start = [*starts, start], 2 * start
    return [*starts, *range(chunk, end, chunk)]


def _fields(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else vars(config)


def windows(config: Any) -> list[int]:
    """Keys that a query of each layer sees at most. `trained_len`: Phase A's context, whose short windows a longer one keeps."""
    c = _fields(config)
    T, pattern, trained = c["sequence_len"], c["window_pattern"].upper(), c.get("trained_len", c["sequence_len"])
    short = min(T, 128 * math.ceil(math.ceil(trained / 4) / 128))
    return [T if pattern[i % len(pattern)] == "L" else short for i in range(c["n_layer"] - 1)] + [T]


def _routed(c: Mapping[str, Any]) -> list[int]:
    """Routed blocks, and routed heads where there are any, of a layer."""
    return [routed for routed in (c["cl"]["blocks"] - c["cl"]["shared"], c["n_head"] - c["cl"]["shared_heads"]) if routed]


def _working(cl: Mapping[str, Any]) -> int:
    """Blocks of a layer that work for a token: of a reserve, once it is released, those that join."""
    return cl["shared"] + cl["active"] + min(cl["join"], cl["released"])


def matmul_params(config: Any) -> int:
    """Weights that work for one token. Heads that were not chosen are multiplied by 0, not skipped, so they count."""
    c = _fields(config)
    L, n, cl = c["n_layer"], c["n_embd"], c.get("cl")
    kv, padded = c["n_kv_head"] * (n // c["n_head"]), math.ceil(c["vocab_size"] / PAD_VOCAB) * PAD_VOCAB
    hidden = 4 * n if cl is None else _working(cl) * cl["block"]
    return L * (2 * n * n + 2 * kv * n + 2 * hidden * n) + GATE * c["n_kv_head"] * math.ceil(L / 2) + padded * n + SMEAR


def params(config: Any) -> dict[str, int]:
    """{"total", "active"}: all parameters, and those without the blocks that a token leaves idle."""
    c = _fields(config)
    L, n, cl = c["n_layer"], c["n_embd"], c.get("cl")
    kv, padded = c["n_kv_head"] * (n // c["n_head"]), math.ceil(c["vocab_size"] / PAD_VOCAB) * PAD_VOCAB
    active, idle = matmul_params(c) + padded * (n + math.ceil(L / 2) * kv) + 2 * L + 2, 0
    if cl is not None:
        active += L * sum(math.ceil(routed / ROUTER_ROWS) * ROUTER_ROWS * n + routed for routed in _routed(c))  # routers, balances
        idle = L * 2 * n * cl["block"] * (cl["blocks"] - _working(cl))
    return {"total": active + idle, "active": active}


def additional(config: Any) -> int:
    """Parameters that a Model-CL has beyond dense's: router rows and balances, and hidden units where it is wider. 0 for a dense config."""
    c = _fields(config)
    return params(c)["total"] - params({**c, "cl": None})["total"]


def flops_per_token(config: Any) -> float:
    """Training FLOPs per token, forward and backward, of what works for it, routing included."""
    c = _fields(config)
    L, n, cl = c["n_layer"], c["n_embd"], c.get("cl")
    flops = 6 * matmul_params(config) + sum(12 * n * w for w in windows(config))
    if cl is not None:  # pooling has no backward, a router only that of its weight
        starts = len(boundaries(c["sequence_len"], cl["chunk"]))
        flops += starts * 2 * n + starts / c["sequence_len"] * L * 4 * sum(_routed(c)) * n
    return flops


def ledger(config: Any) -> str:
    """What a model has and costs beside the dense model of its depth and width, in one line."""
    c = _fields(config)
    dense, mine = ((*params(x).values(), flops_per_token(x)) for x in ({**c, "cl": None}, c))
    names = ("parameters", "active ones", "training FLOPs per token")
    return ", ".join(f"{value:,.0f} {name} ({value / of:.1%} of dense)" for name, value, of in zip(names, mine, dense))
