"""
Which blocks serve which passage: one decision per chunk, from the tokens before it only, made once per forward for all layers.

A chunk's feature is the mean of the normalised token embeddings before it, less what all text has in common; a router row per block
scores it. Where no token is in reach (chunk 0, or a chunk right after BOS) it is BOS's own embedding: a constant, learned choice.

B rows, T positions, S chunks, n width, L layers, R routed blocks, k chosen ones.
"""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_cl.accounting import boundaries
from nanochat_cl.seeds import seed_for

ROUTER_STD = 0.02   # zeros would make ties
MEMORY = 0.99       # factor per micro-batch on the token counts
GRID = 64           # embeddings are rounded to 1/64: sums of such numbers are exact in float32, so every path pools to the same bits


class Decision(NamedTuple):
    """What one layer is told."""
    choice: Tensor             # (B, S, k) routed blocks, int64
    gate: Tensor               # (B, S, k) their factors, float32, around 1
    lengths: tuple[int, ...]   # positions of each chunk, their sum is T


class State(NamedTuple):
    """What cached decoding carries from call to call."""
    total: Tensor   # (B, n) sum over the tokens in reach
    weight: Tensor  # (B, 1) how many there are
    choice: Tensor  # (L, B, k) of the chunk in progress
    gate: Tensor    # (L, B, k)

    def expand(self, rows: int) -> "State":
        """The state of one row for `rows` rows, copied."""
        return State(*(t.expand(rows, -1).clone() for t in self[:2]), *(t.expand(-1, rows, -1).clone() for t in self[2:]))


class Nudge(torch.autograd.Function):
    """
    Passes gates through and hands `excess` (L, R) to `balance` (L, R) as its gradient. So the optimizer, which averages gradients over
    micro-batches and ranks anyway, lowers the balance of a block that served more than its share and raises that of one that served less.
    """
    @staticmethod
    def forward(ctx, gate: Tensor, balance: Tensor, excess: Tensor) -> Tensor:
        ctx.save_for_backward(excess)
        return gate.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.saved_tensors[0], None


def features(table: Tensor, idx: Tensor) -> Tensor:
    """Normalised rows `idx` (...) of an embedding table (V, n) on a grid of 1/64: (..., n) float32, without gradient."""
    rows = table.detach()[idx].float()
    return torch.round(F.rms_norm(rows, rows.shape[-1:]) * GRID) / GRID


def common(token_count: Tensor, table: Tensor) -> Tensor:
    """
    (n,) what all text has in common: the mean feature of the tokens seen in training. Without taking it off, the features of any two
    passages point the same way, routers learn that direction, and every document ends up with the same blocks (measured: docs/model-cl.md).
    """
    rows = F.rms_norm(table.detach().float(), table.shape[-1:])
    return token_count @ rows / token_count.sum().clamp(min=1)


def reach_weights(idx: Tensor, starts: list[int], cl: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """
    How much each token of idx (B, T) counts for a chunk that starts at each of `starts`, (B, S, T), and how much what came before
    idx does, (B, S, 1). "bos": all tokens since the last BOS; "row": all; "ema": all, half as much every `chunk` / 2 tokens. BOS never.
    """
    position = torch.arange(idx.shape[1], device=idx.device)
    start = torch.tensor(starts, device=idx.device)[:, None]                       # (S, 1)
    before, bos = (position < start)[None], (idx == cl["bos"])[:, None]            # (1, S, T), (B, 1, T)
    if cl["reach"] == "bos":
        last = torch.where(before & bos, position, -1).amax(-1, keepdim=True)      # (B, S, 1)
        return (before & (position > last)).float(), (last < 0).float()
    if cl["reach"] == "row":
        return (before & ~bos).float(), torch.ones(idx.shape[0], len(starts), 1, device=idx.device)
    decay = lambda distance: torch.exp2(-distance.clamp(min=0) / (cl["chunk"] / 2))
    return (before & ~bos) * decay(start - 1 - position), decay(start.float())[None].expand(idx.shape[0], -1, -1)


def decide(model: torch.nn.Module, idx: Tensor, kv_cache: Any = None) -> None:
    """
    Choose the blocks of every layer for idx (B, T) and leave the decisions at `block.mlp.decision`. With a cache, idx continues what
    the cache holds: the chunk in progress keeps its blocks. In training the blocks' use is counted.
    """
    cl, mlps = model.config.cl, [block.mlp for block in model.transformer.h]
    routed, T = cl["blocks"] - cl["shared"], idx.shape[1]
    position = kv_cache.get_pos() if kv_cache is not None else 0
    state = getattr(kv_cache, "routing", None) if position else None
    if position and state is None:
        raise RuntimeError("the KV cache holds tokens but no routing state: build it after the patches are applied")
    starts = [start - position for start in boundaries(position + T, cl["chunk"]) if start >= position]
    lengths = tuple(b - a for a, b in zip(starts, [*starts[1:], T]))
    frozen = getattr(model, "routing_embedding", None)
    table = model.transformer.wte.weight if frozen is None else frozen
    everywhere = common(model.token_count, table)  # as counted before this batch, which must not take part in its own routing
    if model.training and frozen is None:
        ones = torch.ones_like(idx.flatten(), dtype=torch.float32)
        seen = torch.zeros_like(model.token_count).index_add(0, idx.flatten(), ones)  # whole numbers: the same in any order of adding
        model.token_count.mul_(MEMORY).add_(seen)

    weights, carried = reach_weights(idx, starts if kv_cache is None else [*starts, T], cl)
    total, weight = weights @ features(table, idx), weights.sum(-1, keepdim=True)  # (B, S, n), (B, S, 1); the last for the cache
    if state is not None:
        total, weight = total + carried * state.total[:, None], weight + carried * state.weight[:, None]
    choice = gate = None
    if starts:
        total_s, weight_s = total[:, :len(starts)], weight[:, :len(starts)]
        constant = features(table, torch.tensor(cl["bos"], device=idx.device))
        pooled = torch.where(weight_s > 0, total_s / weight_s.clamp(min=1e-6), constant) - everywhere
        pooled = F.rms_norm(pooled, pooled.shape[-1:])
        router = torch.stack([mlp.router[:routed] for mlp in mlps])
        balance = torch.stack([mlp.balance for mlp in mlps])                       # (L, R)
        score = torch.einsum("bsn,lrn->lbsr", pooled, router)
        choice = (score + balance[:, None, None]).detach().topk(cl["active"]).indices
        gate = 2 * torch.sigmoid(score.gather(-1, choice))
        if model.training:
            chosen = torch.zeros_like(score).scatter(-1, choice, 1.0).detach()     # (L, B, S, R)
            used = torch.einsum("lbsr,s->lr", chosen, torch.tensor(lengths, device=idx.device, dtype=torch.float32))
            with torch.no_grad():
                for mlp, tokens in zip(mlps, used):
                    mlp.usage.add_(tokens)
            gate = Nudge.apply(gate, balance, used / idx.numel() - cl["active"] / routed)
    if not starts or starts[0] > 0:                                                # the chunk in progress goes on
        lengths = ((starts or [T])[0], *lengths)
        choice, gate = ((state_part[:, :, None] if part is None else torch.cat([state_part[:, :, None], part], dim=2))
                        for state_part, part in ((state.choice, choice), (state.gate, gate)))
    if kv_cache is not None:
        kv_cache.routing = State(total[:, -1], weight[:, -1], choice[:, :, -1], gate[:, :, -1])
    for layer, mlp in enumerate(mlps):
        mlp.decision = Decision(choice[layer], gate[layer], lengths)


def init(model: torch.nn.Module) -> None:
    """Fill what nanochat's init_weights doesn't know. Its own generator: the global stream stays where the dense model leaves it."""
    generator = torch.Generator().manual_seed(seed_for(torch.initial_seed(), "router"))
    wte = model.transformer.wte.weight
    model.register_buffer("token_count", torch.zeros(wte.shape[0], device=wte.device))
    with torch.no_grad():
        for block in model.transformer.h:
            router = block.mlp.router
            router.copy_(torch.randn(router.shape, generator=generator) * ROUTER_STD)
            block.mlp.balance.zero_()
            block.mlp.usage.zero_()


def freeze(model: torch.nn.Module, optimizer: torch.optim.Optimizer, table: Tensor | None = None) -> None:
    """
    From now on the same passage chooses the same blocks: features come from a copy of the token embeddings (`table`, when the model
    isn't at the state to be kept), token counts stand, routers and balance get a learning rate of 0. A dense model is left as it is.
    """
    if getattr(model.config, "cl", None) is None:
        return
    table = model.transformer.wte.weight if table is None else table
    model.register_buffer("routing_embedding", table.detach().clone(), persistent=False)
    for group in optimizer.param_groups:
        if group.get("routing"):
            group["lr"] = group["initial_lr"] = 0.0


def usage(model: torch.nn.Module) -> Tensor:
    """(L, R) tokens that each routed block served in training since the last reset, on this rank."""
    return torch.stack([block.mlp.usage for block in model.transformer.h]).clone()


def reset_usage(model: torch.nn.Module) -> None:
    for block in model.transformer.h:
        block.mlp.usage.zero_()


@torch.no_grad()
def choices(model: torch.nn.Module, idx: Tensor) -> Tensor:
    """(L, B, S, k) blocks that a forward of idx (B, T) uses, each chunk's in ascending order. Counts nothing."""
    training = model.training
    model.eval()
    decide(model, idx)
    model.train(training)
    found = torch.stack([block.mlp.decision.choice for block in model.transformer.h])
    for block in model.transformer.h:
        block.mlp.decision = None
    return found.sort(-1).values


def coverage(idx: Tensor, cl: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """
    Two masks over idx (B, T): served under the constant choice; and routed by its own document alone (tokens of it were in reach,
    and none of another's).
    """
    starts = boundaries(idx.shape[1], cl["chunk"])
    weights, _ = reach_weights(idx, starts, cl)
    lengths = torch.tensor([b - a for a, b in zip(starts, [*starts[1:], idx.shape[1]])], device=idx.device)
    document = (idx == cl["bos"]).cumsum(-1)                                       # (B, T)
    in_reach = weights > 0
    first = torch.where(in_reach, document[:, None], document.max() + 1).amin(-1)  # (B, S) first document in reach
    last = torch.where(in_reach, document[:, None], -1).amax(-1)
    spread = lambda per_chunk: per_chunk.repeat_interleave(lengths, dim=1)
    return spread(~in_reach.any(-1)), spread((first == last)) & (spread(last) == document)
