"""
Which blocks serve which passage: one decision per chunk, from the tokens before it only, made once per forward for all layers.

A chunk's feature is the mean of the normalised token embeddings before it, less what all text has in common; a router row per block
scores it. Where no token is in reach (chunk 0, or a chunk right after BOS) it is BOS's own embedding: a constant, learned choice.

B rows, T positions, S chunks, n width, L layers, R routed blocks, k chosen ones.
"""
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce

from nanochat_cl.accounting import ROUTER_ROWS, boundaries
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
    chosen: tuple[tuple[Tensor, Tensor], ...]  # for each kind of part, choice and gate (L, B, k) of the chunk in progress

    def expand(self, rows: int) -> "State":
        """The state of one row for `rows` rows, copied."""
        return State(*(t.expand(rows, -1).clone() for t in self[:2]),
                     tuple(tuple(t.expand(-1, rows, -1).clone() for t in pair) for pair in self.chosen))


class Routed(torch.nn.Module):
    """
    A part of a layer that is routed: R blocks, of which the last `held` are in reserve. Of the others `active` serve a chunk, and of
    those released from the reserve `joining` besides. `decision` is set for the length of a forward by `decide`.
    """

    def __init__(self, n_embd: int, routed: int, active: int, held: int = 0, join: int = 0):
        super().__init__()
        self.routed, self.active, self.held, self.join, self.joining = routed, active, held, join, 0
        # Sharded AdamW cuts the first dimension, so the ranks must divide it: a few rows more, which no block has and no step moves.
        self.router = torch.nn.Parameter(torch.empty(-(-routed // ROUTER_ROWS) * ROUTER_ROWS, n_embd))
        self.balance = torch.nn.Parameter(torch.empty(routed))    # added to the scores for choosing, not for gates
        self.register_buffer("usage", torch.empty(routed))        # tokens served in training
        self.register_buffer("released", torch.empty((), dtype=torch.int64), persistent=False)  # blocks of the reserve
        self.decision: Decision | None = None

    def decided(self) -> Decision:
        if self.decision is None:
            raise RuntimeError("a Model-CL layer ran without a routing decision: apply the patches before GPT.forward is called")
        return self.decision


def parts(model: torch.nn.Module) -> list[list[Routed]]:
    """By kind, one for each layer: the MLPs, and the output projections of attention where heads are routed."""
    layers = model.transformer.h
    kinds = [layer.mlp for layer in layers], [layer.attn.c_proj for layer in layers]
    return [kind for kind in kinds if isinstance(kind[0], Routed)]


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


def features(table: Tensor, idx: Tensor | int) -> Tensor:
    """Normalised rows `idx` (...), or the one row, of an embedding table (V, n) on a grid of 1/64: (..., n) float32, without gradient."""
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
    idx does, (B, S, 1). "bos": all tokens since the last BOS; "row": all; "ema": all, half as much every `chunk` / 2 tokens; "token": the
    one that starts the chunk, which is all of it. BOS never.
    """
    position = torch.arange(idx.shape[1], device=idx.device)
    start = torch.tensor(starts, device=idx.device)[:, None]                       # (S, 1)
    before, bos = (position < start)[None], (idx == cl["bos"])[:, None]            # (1, S, T), (B, 1, T)
    if cl["reach"] == "token":
        return (position == start).float()[None] * ~bos, torch.zeros(idx.shape[0], len(starts), 1, device=idx.device)
    if cl["reach"] == "bos":
        last = torch.where(before & bos, position, -1).amax(-1, keepdim=True)      # (B, S, 1)
        return (before & (position > last)).float(), (last < 0).float()
    if cl["reach"] == "row":
        return (before & ~bos).float(), torch.ones(idx.shape[0], len(starts), 1, device=idx.device)
    decay = lambda distance: torch.exp2(-distance.clamp(min=0) / (cl["chunk"] / 2))
    return (before & ~bos) * decay(start - 1 - position), decay(start.float())[None].expand(idx.shape[0], -1, -1)


def centred(total: Tensor, weight: Tensor, constant: Tensor, everywhere: Tensor) -> Tensor:
    """Chunk features from sums (B, S, n) over tokens of `weight` (B, S, 1); `constant` (n,) where there are none."""
    pooled = torch.where(weight > 0, total / weight.clamp(min=1e-6), constant) - everywhere
    return F.rms_norm(pooled, pooled.shape[-1:])


@torch.no_grad()
def passages(model: torch.nn.Module, idx: Tensor) -> Tensor:
    """The features (P, n) by which the chunks of idx (B, T) are routed in Phase B, but for those under the constant choice."""
    weights, _ = reach_weights(idx, boundaries(idx.shape[1], model.config.cl["chunk"]), model.config.cl)
    table, weight = model.routing_embedding, weights.sum(-1, keepdim=True)
    everywhere = common(model.token_count, table)
    return centred(weights @ features(table, idx), weight, everywhere, everywhere)[weight[..., 0] > 0]


def choose(parts: list[Routed], pooled: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """
    The blocks of one kind, `parts` (one for each layer, all alike), for chunks of `lengths` positions with the features `pooled` (B, S, n):
    choice and gate (L, B, S, k), and used (L, R) tokens. Released blocks join the others of a chunk and displace none.
    """
    first = parts[0]
    # In float64, which no GPU rounds to TF32 (Apple's have none): near ties must fall alike in training and in decoding.
    exact, routers = torch.float32 if pooled.device.type == "mps" else torch.float64, [part.router[:part.routed] for part in parts]
    score = torch.einsum("bsn,lrn->lbsr", pooled.to(exact), torch.stack(routers).to(exact)).float()
    preference = (score + torch.stack([part.balance for part in parts])[:, None, None]).detach()
    old = first.routed - first.held
    choice = preference[..., :old].topk(first.active).indices
    if first.joining:
        held_back = torch.arange(first.held, device=pooled.device) >= first.released
        joined = preference[..., old:].masked_fill(held_back, -torch.inf).topk(first.joining).indices
        choice = torch.cat([choice, old + joined], dim=-1)
    chosen = torch.zeros_like(preference).scatter(-1, choice, 1.0)                 # (L, B, S, R)
    used = torch.einsum("lbsr,s->lr", chosen, torch.tensor(lengths, device=pooled.device, dtype=torch.float32))
    return choice, 2 * torch.sigmoid(score.gather(-1, choice)), used


def traced_sum(counts: Tensor) -> Tensor:
    """The sum over all ranks, so that they go on routing alike, as torch.compile can trace it (`runs.over_ranks` is for the host)."""
    return all_reduce(counts, "sum", dist.group.WORLD) if dist.is_initialized() else counts


def count_tokens(model: torch.nn.Module, idx: Tensor) -> None:
    """Add the tokens of idx (B, T), and those of the other ranks, to the counts that `common` weighs embeddings by."""
    ones = torch.ones_like(idx.flatten(), dtype=torch.float32)
    seen = torch.zeros_like(model.token_count).index_add(0, idx.flatten(), ones)  # whole numbers: the same in any order of adding
    model.token_count.mul_(MEMORY).add_(traced_sum(seen))


def count_use(kind: list[Routed], gate: Tensor, used: Tensor, tokens: int, over_ranks: bool) -> Tensor:
    """
    Add the tokens that each block served, used (L, R) out of `tokens`, to the parts' counters, and return the gate (L, B, S, k) whose
    backward tells the optimizer how far a block's share of them is from an equal one.
    """
    if over_ranks:
        used, tokens = traced_sum(used), tokens * (dist.get_world_size() if dist.is_initialized() else 1)
    with torch.no_grad():
        for part, served in zip(kind, used):
            part.usage.add_(served)
    old = kind[0].routed - kind[0].held
    excess = F.pad(used[:, :old] / tokens - kind[0].active / old, (0, kind[0].held))
    return Nudge.apply(gate, torch.stack([part.balance for part in kind]), excess)


def decide(model: torch.nn.Module, idx: Tensor, kv_cache: Any = None, learning: bool = False) -> "State | None":
    """
    Choose blocks and heads of every layer for idx (B, T) and leave the decision with each part. With a cache, idx continues what the
    cache holds: the chunk in progress keeps its blocks, and what the cache is to hold afterwards is returned. Of a forward that is
    `learning`, on all ranks, their use is counted.
    """
    cl, kinds, T = model.config.cl, parts(model), idx.shape[1]
    position = kv_cache.get_pos() if kv_cache is not None else 0
    state = getattr(kv_cache, "routing", None) if position else None
    if position and state is None:
        raise RuntimeError("the KV cache holds tokens but no routing state: build it after the patches are applied")
    starts = [start - position for start in boundaries(position + T, cl["chunk"]) if start >= position]  # of the chunks that begin in idx
    lengths = tuple(b - a for a, b in zip(starts, [*starts[1:], T]))
    frozen = getattr(model, "routing_embedding", None)
    table = model.transformer.wte.weight if frozen is None else frozen
    # As counted before this batch, which must not take part in its own routing. It costs V x n, so not where no chunk starts.
    everywhere = common(model.token_count, table) if starts else None
    if counting := learning and frozen is None:
        count_tokens(model, idx)

    # Sums over the tokens in reach of each chunk, and with a cache of the chunk that comes next: (B, S, n), and how many, (B, S, 1).
    weights, carried = reach_weights(idx, starts if kv_cache is None else [*starts, T], cl)
    total, weight = weights @ features(table, idx), weights.sum(-1, keepdim=True)
    if state is not None:
        total, weight = total + carried * state.total[:, None], weight + carried * state.weight[:, None]

    made: list[tuple[Tensor, Tensor]] = []                                         # for each kind, choice and gate (L, B, S, k)
    if starts:
        constant = features(table, cl["bos"])
        pooled = centred(total[:, :len(starts)], weight[:, :len(starts)], constant, everywhere)
        for kind in kinds:
            choice, gate, used = choose(kind, pooled, lengths)
            made.append((choice, count_use(kind, gate, used, idx.numel(), counting) if learning else gate))
    if not starts or starts[0] > 0:                                                # idx begins within a chunk, which keeps its blocks
        lengths = ((starts or [T])[0], *lengths)
        kept = [tuple(t[:, :, None] for t in pair) for pair in state.chosen]
        made = [tuple(torch.cat(pair, dim=2) for pair in zip(old, new)) for old, new in zip(kept, made)] if made else kept

    for kind, (choice, gate) in zip(kinds, made):
        for layer, part in enumerate(kind):
            part.decision = Decision(choice[layer], gate[layer], lengths)
    last = tuple((choice[:, :, -1], gate[:, :, -1]) for choice, gate in made)
    return None if kv_cache is None else State(total[:, -1], weight[:, -1], last)


def forget(model: torch.nn.Module) -> None:
    """Drop the decisions: they hold on to the autograd graph."""
    for kind in parts(model):
        for part in kind:
            part.decision = None


def init(model: torch.nn.Module) -> None:
    """Fill what nanochat's init_weights doesn't know. Its own generator: the global stream stays where the dense model leaves it."""
    generator = torch.Generator().manual_seed(seed_for(torch.initial_seed(), "router"))
    wte = model.transformer.wte.weight
    model.register_buffer("token_count", torch.zeros(wte.shape[0], device=wte.device))
    with torch.no_grad():
        for kind in parts(model):
            for part in kind:
                part.router.copy_(torch.randn(part.router.shape, generator=generator) * ROUTER_STD)
                part.balance.zero_()
                part.usage.zero_()
    release(model, model.config.cl["released"])
    if model.config.cl.get("frozen"):  # a checkpoint out of Phase B, which holds the table
        model.register_buffer("routing_embedding", wte.detach().clone())


def release(model: torch.nn.Module, count: int) -> None:
    """From now on `count` blocks of each layer's reserve may be chosen. They were never written to, so they add 0 until they learn."""
    model.config.cl["released"] = count
    for part in (part for kind in parts(model) for part in kind):
        part.released.fill_(min(count, part.held))
        part.joining = min(part.join, count)


def freeze(model: torch.nn.Module, optimizer: torch.optim.Optimizer, routers: float = 0.0) -> None:
    """
    From now on the same passage chooses the same blocks: features come from a copy of the token embeddings, or from the one that a
    checkpoint out of Phase B brought; token counts and balance stand, and so do routers, whose learning rates are multiplied by `routers`.
    A dense model is left as it is.
    """
    if getattr(model.config, "cl", None) is None:
        return
    if not model.config.cl.get("frozen"):
        model.register_buffer("routing_embedding", model.transformer.wte.weight.detach().clone(), persistent=False)
    for group in optimizer.param_groups:
        if group.get("routing"):
            group["initial_lr"] *= routers if group["params"][0].ndim == 2 else 0.0  # the balance is a vector
            group["lr"] = group["initial_lr"]


def usage(model: torch.nn.Module) -> list[Tensor]:
    """For each kind of part (L, R) tokens that each routed block served in training since the last reset; in Phase B on this rank."""
    return [torch.stack([part.usage for part in kind]).clone() for kind in parts(model)]


def reset_usage(model: torch.nn.Module) -> None:
    for kind in parts(model):
        for part in kind:
            part.usage.zero_()


@torch.no_grad()
def choices(model: torch.nn.Module, idx: Tensor) -> list[Tensor]:
    """For each kind of part (L, B, S, k) blocks that a forward of idx (B, T) uses, each chunk's in ascending order. Counts nothing."""
    decide(model, idx)
    found = [torch.stack([part.decision.choice for part in kind]).sort(-1).values for kind in parts(model)]
    forget(model)
    return found


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
