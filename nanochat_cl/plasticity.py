"""
Which weights may learn in Phase B, as rules over the use of blocks.

    all                     everything, as in Phase A
    frozen-shared[:factor]  learning rates of all that every token passes through (attention, embeddings, head, scalars, shared blocks)
                            times `factor`, default 0; the routed blocks of Model-CL, or the MLPs of a dense model, learn at full rate
    budget:p                of each layer's routed blocks only the share p that this batch uses most for its kind of text

Rules can be joined by a plus sign: `budget:0.25+frozen-shared:0.1`. L layers, R routed blocks, G blocks, S shared ones, k chosen per chunk.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cl.command import UserError

EXPECTED = "all, frozen-shared[:factor] with a factor of 0 to 1, budget:p with 0 < p <= 1, or the latter two joined by +"


@dataclass(frozen=True)
class Rule:
    shared: float = 1.0   # factor on the learning rates of what is not routed
    budget: float = 1.0   # share of each layer's routed blocks that may learn from a batch


def parse(text: str) -> Rule:
    """The rule that a recipe names; UserError on anything else."""
    given: dict[str, float] = {}
    for part in text.split("+"):
        name, colon, number = part.partition(":")
        key = {"frozen-shared": "shared", "budget": "budget"}.get(name)
        if part == text == "all":
            break
        try:
            value = float(number) if colon else {"shared": 0.0}[key]
        except (KeyError, ValueError):
            value = math.nan
        if key is None or key in given or not 0 <= value <= 1 or (key == "budget" and value == 0):
            raise UserError(f"plasticity {text!r}: can't read {part!r}; expected {EXPECTED}")
        given[key] = value
    return Rule(**given)


def busiest(used: Tensor, general: Tensor, budget: float) -> Tensor:
    """
    Mask (L, R) of the ceil(budget * R) blocks per layer with the largest tf * idf: tf a block's share of this batch's use `used` (L, R),
    idf the negative log of its share of the use on general text. Blocks that served nothing are never among them.
    """
    if budget == 1:
        return torch.ones_like(used, dtype=torch.bool)
    share = lambda tokens: tokens / tokens.sum(1, keepdim=True).clamp(min=1)
    score = share(used) * -torch.log(share(general + 1))  # one token more each: never used is not infinitely rare
    order = score.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(used, dtype=torch.bool).scatter(1, order[:, :math.ceil(budget * used.shape[1])], True) & (used > 0)


def slow(model: torch.nn.Module, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the learning rates of all but the routed blocks (of a dense model: all but the MLPs) by `factor`."""
    mlp = {id(p) for block in model.transformer.h for p in block.mlp.parameters()}
    for group in optimizer.param_groups:
        if "isolate" in group:
            shared = model.transformer.h[0].mlp.shared
            before = group.get("block_scale") or [1.0] * len(group["params"][0])
            group["block_scale"] = [s * (factor if g < shared else 1.0) for g, s in enumerate(before)]
        elif id(group["params"][0]) not in mlp:
            group["initial_lr"] *= factor
            group["lr"] *= factor


def hold(model: torch.nn.Module, learns: Tensor) -> None:
    """Make the gradient of every routed block (and router row) outside `learns` (L, R) zero: the optimizer leaves it exactly as it is."""
    for block, mask in zip(model.transformer.h, learns):
        mlp = block.mlp
        for grad in (mlp.c_fc.weight.grad[mlp.shared:], mlp.c_proj.weight.grad[mlp.shared:], mlp.router.grad[:mlp.routed]):
            grad.masked_fill_(~mask.view(-1, *[1] * (grad.ndim - 1)), 0)  # not a product: inf * 0 is no zero


def begin(rule: str | Rule, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    """
    Set the optimizer up for a rule, and return what to call between backward and step with the batch's use of blocks, (L, R) over all
    ranks. General use is what the model's counters hold now: Phase A's. UserError where a dense model is asked for a budget of blocks.
    """
    rule = parse(rule) if isinstance(rule, str) else rule
    sparse = getattr(model.config, "cl", None) is not None
    if rule.budget < 1 and not sparse:
        raise UserError("budget:p chooses among routed blocks and a dense model has none; use all or frozen-shared for this arm")
    if rule.shared != 1:
        slow(model, optimizer, rule.shared)
    if rule.budget == 1:
        return lambda used: None
    general = torch.stack([block.mlp.usage for block in model.transformer.h]).clone()
    return lambda used: hold(model, busiest(used, general, rule.budget))


def mark_rows(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give a dense model's optimizer Model-CL's row masks: embeddings of tokens that a batch doesn't hold stand still."""
    tables = {id(model.transformer.wte.weight), *(id(ve.weight) for ve in model.value_embeds.values())}
    for group in optimizer.param_groups:
        if id(group["params"][0]) in tables:
            group["rows"] = True


def idle_share(learned: Tensor) -> float:
    """Share of the (layer, block) pairs of a mask (L, R) that did not learn."""
    return 1 - learned.float().mean().item()


def entropy(used: Tensor) -> float:
    """Entropy of the use of blocks (L, R) over log R, mean of the layers: 1 when all serve alike, 0 when one serves everything."""
    share = used.double() / used.double().sum(1, keepdim=True)
    return (torch.special.entr(share).sum(1).mean() / math.log(used.shape[1])).item()


def agreement(before: Tensor, now: Tensor) -> float:
    """Share of blocks in common between two choices (..., k) for the same chunks, in any order."""
    return (before.unsqueeze(-1) == now.unsqueeze(-2)).any(-1).double().mean().item()
