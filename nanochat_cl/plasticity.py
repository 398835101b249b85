"""
Which weights may learn in Phase B, as rules over the use of blocks.

    all                     everything, as in Phase A
    budget:p                of each layer's routed blocks, and heads, only the share p that this batch uses most for its kind of text
    frozen-shared[:factor]  learning rates of all that every token passes through times `factor`, default 0; the routed blocks and heads
                            of Model-CL, or the MLPs of a dense model, learn at full rate
    blocks, attention, embeddings, head, scalars [:factor]    one part of the former: shared blocks (a dense model has none: no effect);
                            shared heads, or dense attention; token and value embeddings; output head; per-layer scalars and the smear gate
    routers:factor          routers learn, too, at their learning rates times `factor`; without it the same passage keeps its blocks

Rules can be joined by a plus sign: `budget:0.25+frozen-shared:0.1`. L layers, R routed blocks, G blocks, S shared ones, k chosen per chunk.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat_cl import routing
from nanochat_cl.command import UserError

SHARED = ("blocks", "attention", "embeddings", "head", "scalars")
EXPECTED = f"all, or budget:p with 0 < p <= 1, frozen-shared and {', '.join((*SHARED, 'routers'))} [:factor of 0 to 1], joined by +"


@dataclass(frozen=True)
class Rule:
    shared: dict[str, float] = field(default_factory=dict)  # part -> factor on the learning rates of what is not routed there
    budget: float = 1.0                                     # share of each layer's routed blocks that may learn from a batch
    routers: float = 0.0                                    # factor on the learning rates of routers


def parse(text: str) -> Rule:
    """The rule that a recipe names; UserError on anything else."""
    given: dict[str, float] = {}
    for part in [] if text == "all" else text.split("+"):
        name, colon, number = part.partition(":")
        try:
            value = float(number) if colon or name == "budget" else 0.0
        except ValueError:
            value = math.nan
        names = SHARED if name == "frozen-shared" else (name,)
        if not {*names} <= {*SHARED, "budget", "routers"} or {*names} & {*given} or not 0 <= value <= 1 or (name == "budget" and value == 0):
            raise UserError(f"plasticity {text!r}: can't read {part!r}; expected {EXPECTED}")
        given |= dict.fromkeys(names, value)
    return Rule(budget=given.pop("budget", 1.0), routers=given.pop("routers", 0.0), shared=given)


def busiest(used: Tensor, general: Tensor, budget: float) -> Tensor:
    """
    Mask (L, R) of the ceil(budget * R) blocks per layer with the largest tf * idf: tf a block's share of this batch's use `used` (L, R),
    idf the negative log of its share of the use on general text (the weights of words in Spärck Jones 1972). Blocks that served nothing are
    never among them.
    """
    if budget == 1:
        return torch.ones_like(used, dtype=torch.bool)
    share = lambda tokens: tokens / tokens.sum(1, keepdim=True).clamp(min=1)
    score = share(used) * -torch.log(share(general + 1))  # one token more each: never used is not infinitely rare
    order = score.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(used, dtype=torch.bool).scatter(1, order[:, :math.ceil(budget * used.shape[1])], True) & (used > 0)


def slow(model: torch.nn.Module, optimizer: torch.optim.Optimizer, factors: dict[str, float]) -> None:
    """Multiply the learning rates of the parts named in `factors`, all but routed blocks and heads (of a dense model: all but the MLPs)."""
    h, config = model.transformer.h, model.config
    own = {"head": [model.lm_head.weight], "embeddings": [model.transformer.wte.weight, *(ve.weight for ve in model.value_embeds.values())],
           "blocks": [p for block in h for p in block.mlp.parameters()], "attention": [p for block in h for p in block.attn.parameters()]}
    part_of = {id(p): part for part, members in own.items() for p in members}
    for group in optimizer.param_groups:
        first = group["params"][0]
        part = part_of.get(id(first), "scalars")
        factor = factors.get(part, 1.0)
        if "isolate" in group:  # of a stack of blocks or heads the first ones are shared
            heads_each = config.n_head // len(first)  # more than 1 for keys and values: shared is what any shared head uses
            shared = h[0].mlp.shared if part == "blocks" else math.ceil(config.cl["shared_heads"] / heads_each)
            before = group.get("block_scale") or [1.0] * len(first)
            group["block_scale"] = [s * (factor if g < shared else 1.0) for g, s in enumerate(before)]
        elif not group.get("routing") and part != "blocks":
            group["initial_lr"] *= factor
            group["lr"] *= factor


def hold(model: torch.nn.Module, learns: list[Tensor]) -> None:
    """
    Make the gradient of all that belongs to the routed blocks, and heads, outside `learns` (for each kind (L, R)) zero: the optimizer
    leaves it exactly as it is. A key/value head that several heads use is held when all of them are.
    """
    def zero(grad: Tensor | None, mask: Tensor) -> None:
        """grad (rows, ...): rows where mask is False; not by a product, for inf * 0 is no zero."""
        if grad is not None:
            grad.masked_fill_(~mask.view(-1, *[1] * (grad.ndim - 1)), 0)

    for i, layer in enumerate(model.transformer.h):
        mlp, attn = layer.mlp, layer.attn
        for weight in (mlp.c_fc.weight, mlp.c_proj.weight):
            zero(weight.grad[mlp.shared:], learns[0][i])
        zero(mlp.router.grad[:mlp.routed], learns[0][i])
        if len(learns) > 1:
            heads = torch.cat([learns[1][i].new_ones(attn.c_proj.shared), learns[1][i]])
            keys = heads.view(attn.n_kv_head, -1).any(1)
            for weight, mask in ((attn.c_q, heads), (attn.c_proj, heads), (attn.c_k, keys), (attn.c_v, keys)):
                zero(weight.weight.grad, mask)
            zero(attn.c_proj.router.grad[:attn.c_proj.routed], learns[1][i])
            if attn.ve_gate is not None:
                zero(attn.ve_gate.weight.grad, keys)
                zero(model.value_embeds[str(i)].weight.grad.unflatten(-1, (attn.n_kv_head, -1)).transpose(0, 1), keys)


def begin(rule: str | Rule, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[list[Tensor]], None]:
    """
    Set the optimizer up for a rule, and return what to call between backward and step with the batch's use of blocks, for each kind (L, R)
    over all ranks. General use is what the model's counters hold now: Phase A's. UserError where a dense model is asked for a budget.
    """
    rule = parse(rule) if isinstance(rule, str) else rule
    sparse = getattr(model.config, "cl", None) is not None
    if rule.budget < 1 and not sparse:
        raise UserError("budget:p chooses among routed blocks and a dense model has none; use all or frozen-shared for this arm")
    slow(model, optimizer, rule.shared)
    if rule.budget == 1:
        return lambda used: None
    general = routing.usage(model)
    return lambda used: hold(model, [busiest(now, before, rule.budget) for now, before in zip(used, general)])


def mark_rows(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give a dense model's optimizer Model-CL's row masks: embeddings of tokens that a batch doesn't hold stand still."""
    tables = {id(model.transformer.wte.weight), *(id(ve.weight) for ve in model.value_embeds.values())}
    for group in optimizer.param_groups:
        if id(group["params"][0]) in tables:
            group["rows"] = 1


def entropy(used: Tensor) -> float:
    """Entropy of the use of blocks (L, R) over log R, mean of the layers: 1 when all serve alike, 0 when one of several serves all."""
    share = used.double() / used.double().sum(1, keepdim=True)
    return (torch.special.entr(share).sum(1).mean() / math.log(used.shape[1])).item() if used.shape[1] > 1 else 1.0


def agreement(before: Tensor, now: Tensor) -> float:
    """Share of blocks in common between two choices (..., k) for the same chunks, in any order."""
    return (before.unsqueeze(-1) == now.unsqueeze(-2)).any(-1).double().mean().item()
