"""
How hard a model is trained in Phase B: one recipe for every arm, and what it makes of Phase A's learning rates.

Phase A ends with its schedules run down (weight decay 0, Muon momentum 0.90), so Phase B starts all of them anew. Groups and flags are
nanochat's: the peak rate of a group is its `initial_lr`; a batch is counted in tokens per optimizer step.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from nanochat_cl import growth
from nanochat_cl.command import UserError

REFERENCE_BATCH_TOKENS = 2**19  # the batch at which nanochat's learning-rate flags hold
MUON_MOMENTUM = 0.95
OPTIMIZERS = ("load", "reset", "reset-lr0")
SCHEDULES = {  # factor on the peak when a share `done` of the steps after the warm-up is done; `cool` is the share of the cool-down
    "constant": lambda done, cool: 1.0,
    "cosine": lambda done, cool: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done, cool: 1 - done,
    "wsd": lambda done, cool: min(1.0, (1 - done) / max(cool, 1e-9))}  # warm-up, stable, decay (Hu et al. 2024)


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": f"{help} (default: %(default)s)"})


@dataclass(frozen=True)
class Recipe:
    lr_mult: float = option(1.0, "factor on Phase A's peak learning rates, after scaling by the root of the batch ratio")
    lr_schedule: str = option("constant", "constant, cosine or linear down to zero, or wsd: constant, then linear down to zero")
    cooldown_frac: float = option(0.2, "wsd: share of the steps after the warm-up that cool down")
    warmup_steps: int = option(0, "steps of linear warm-up")
    optimizer: str = option("load", "load Phase A's moments, reset them, or reset-lr0: reset, and fill them at rate 0 during the warm-up")
    weight_decay: float = option(0.0, "of the Muon groups, constant; AdamW groups keep nanochat's constants")
    replay: float = option(0.0, "share of general text in every batch")
    total_batch_size: int = option(0, "tokens per optimizer step; 0: the profile's")
    max_seq_len: int = option(0, "context in tokens; 0: Phase A's")
    plasticity: str = option("all", "which weights may learn: all, or joined by +: budget:p, frozen-shared[:factor], one part[:factor], "
                             "routers:factor, see nanochat_cl/plasticity.py")
    release: str = option("all", "blocks of a reserve that may work in Phase B: all, none, or so many at each milestone, each of which "
                          "compiles the model anew until a quarter of the reserve is out")
    newcomers: str = option("random", "how passages come to choose released blocks: random or passages, see nanochat_cl/growth.py")

    def __post_init__(self):
        for name, known in {"lr_schedule": SCHEDULES, "optimizer": OPTIMIZERS, "newcomers": growth.NEWCOMERS}.items():
            if (given := getattr(self, name)) not in known:
                raise UserError(f"--{name.replace('_', '-')} must be {' or '.join(known)}, got {given!r}")
        growth.released(self.release, held=0, milestone=0)
        if self.optimizer == "reset-lr0" and not self.warmup_steps:
            raise UserError("--optimizer reset-lr0 fills the moments during the warm-up: expected --warmup-steps above 0 (20, say), got 0")
        bounds = dict.fromkeys(("lr_mult", "warmup_steps", "weight_decay", "total_batch_size", "max_seq_len"), math.inf)
        for name, most in {**bounds, "replay": 0.99, "cooldown_frac": 1}.items():
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"--{name.replace('_', '-')} must be between 0 and {most}, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        """`default`, or what differs from it: the label under which the dense limit is searched for."""
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default) or "default"


def read(label: str) -> Recipe:
    """The recipe of that `name`: "default", or option=value joined by commas; UserError on anything else."""
    given = dict(part.partition("=")[::2] for part in label.split(",") if label != "default")
    kinds = {f.name: type(f.default) for f in fields(Recipe)}
    try:
        return Recipe(**{name: kinds[name](value) for name, value in given.items()})
    except (KeyError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"can't read the recipe {label!r} ({e}): expected default, or option=value joined by commas, the options being "
                        f"{', '.join(kinds)}") from e


def of_arm(recipe: Recipe, own: Mapping[str, Any]) -> Recipe:
    """The recipe of an arm that has options of its `own`: they win, and its lr_mult is a factor on the run's."""
    return replace(recipe, **{**own, "lr_mult": float(f"{recipe.lr_mult * own.get('lr_mult', 1.0):.12g}")})


def of_dense(recipe: Recipe) -> Recipe:
    """The recipe without what is nothing to a dense model: choices of blocks, routers, a reserve; and a cool-down's length without one."""
    rest = [part for part in recipe.plasticity.split("+") if part.partition(":")[0] not in ("budget", "blocks", "routers")]
    length = recipe.cooldown_frac if recipe.lr_schedule == "wsd" else Recipe.cooldown_frac
    return replace(recipe, plasticity="+".join(rest) or "all", cooldown_frac=length, release=Recipe.release, newcomers=Recipe.newcomers)


def multiplier(step: int, steps: int, recipe: Recipe) -> float:
    """Factor on `initial_lr` at 0-based `step` of `steps`: a linear warm-up, then the schedule; above 0 but for reset-lr0's warm-up."""
    if step < recipe.warmup_steps:
        return 0.0 if recipe.optimizer == "reset-lr0" else (step + 1) / recipe.warmup_steps
    return SCHEDULES[recipe.lr_schedule]((step - recipe.warmup_steps) / (steps - recipe.warmup_steps), recipe.cooldown_frac)


def phase_a_lrs(user_config: Mapping[str, Any], batch_tokens: int) -> dict[str, float]:
    """What Phase A handed to `setup_optimizer`: nanochat scales its flags by the root of the batch over 524,288 tokens."""
    scale = math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS)
    return {name: user_config[name] * scale for name in ("unembedding_lr", "embedding_lr", "matrix_lr", "scalar_lr")}


def begin(optimizer: torch.optim.Optimizer, recipe: Recipe, batch_a: int, batch_b: int) -> None:
    """Turn Phase A's peaks into Phase B's, by the root of the ratio of the batches, and start what Phase A ran down anew."""
    for group in optimizer.param_groups:
        group["initial_lr"] *= math.sqrt(batch_b / batch_a) * recipe.lr_mult
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = MUON_MOMENTUM, recipe.weight_decay


def set_step(optimizer: torch.optim.Optimizer, step: int, steps: int, recipe: Recipe) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier(step, steps, recipe)
