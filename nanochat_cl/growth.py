"""
How the reserve of a Model-CL comes to work in Phase B: how many of its blocks when, and which passages will choose them.

Blocks that were held back in Phase A add 0 to the layer's output until they have learned, and join the chosen ones of a chunk without
displacing any: at the moment of release the function is what it was. n width.
"""
import math

import torch
from torch import Tensor

from nanochat_cl import routing
from nanochat_cl.command import UserError

NEWCOMERS = ("random", "passages")
SPREADS = 3  # a passage scores so many standard deviations of a random router's scores for a block that was made for it


def released(rule: str, held: int, milestone: int) -> int:
    """Blocks out of `held` that `rule` has released by a milestone (from 0): `all`, `none`, or so many at each milestone."""
    if rule in ("all", "none"):
        return held if rule == "all" else 0
    if not rule.isdecimal() or not int(rule):
        raise UserError(f"--release must be all, none or a number of blocks per milestone, got {rule!r}")
    return min(held, int(rule) * (milestone + 1))


def rows(rule: str, drawn: Tensor, features: Tensor) -> Tensor:
    """
    Router rows of newcomers, from those `drawn` at the start (m, n) and the features (P, n) of passages now trained on, each of RMS 1.
    `random`: as drawn, so that it is chance, but the same for like passages, which block a passage joins. `passages`: the features of m
    passages, evenly spaced, so that each newcomer is chosen by what is like its own.
    """
    if rule == "random" or not len(features):
        return drawn
    evenly = torch.linspace(0, len(features) - 1, len(drawn)).round().long()
    return features[evenly.to(features.device)] * (SPREADS * routing.ROUTER_STD / math.sqrt(drawn.shape[-1]))


@torch.no_grad()
def grow(model: torch.nn.Module, release: str, newcomers: str, milestone: int, idx: Tensor) -> None:
    """Release what is due at `milestone`, and take nothing back; idx (B, T) is the text that comes next."""
    cl = getattr(model.config, "cl", None)
    if cl is None or (now := released(release, cl["held"], milestone)) <= cl["released"]:
        return
    for mlp in routing.parts(model)[0]:
        new = mlp.router[mlp.routed - mlp.held:][cl["released"]:now]
        new.copy_(rows(newcomers, new, routing.passages(model, idx)))
    routing.release(model, now)
