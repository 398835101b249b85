"""
One arm as it learns in Phase B: a Phase A checkpoint, its optimizer begun anew by the recipe, and what it did since the last milestone.

B rows, T positions, L layers, R routed blocks.
"""
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nanochat import checkpoint_manager, common, gpt

from nanochat_cl import accounting, arms, files, machine, plasticity, recipes, routing, runs
from nanochat_cl.command import UserError
from nanochat_cl.recall import Recall

MEMORY_STEPS = 64       # losses that the running median is taken of
EXPLOSION_NATS = 3.0    # above that median: from the 3 nats of a trained model to those of an untrained one
EXPLOSION_STEPS = 3     # in a row, since one batch of odd documents is no explosion
PASSAGES = 4            # of each window of the stream that are asked for again


@dataclass(frozen=True)
class PhaseA:
    """The last checkpoint of a finished Phase A, not loaded yet."""
    arm: str
    place: Path
    step: int
    meta: dict[str, Any]    # as nanochat's base_train writes it
    result: dict[str, Any]  # phase_a.json; tokens and flops alone for a checkpoint that nanochat itself made

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["model_config"]

    @property
    def cost(self) -> dict[str, float]:
        counts, flops = accounting.params(self.config), accounting.flops_per_token(self.config)
        return {"params_total": counts["total"], "params_active": counts["active"], "flops_per_token": flops}


def find(arm: str, tag: str, remedy: str) -> PhaseA:
    """Checkpoint `tag` of base_checkpoints; `remedy` is the command that makes it."""
    arms.named(arm)
    place = Path(common.get_base_dir()) / "base_checkpoints" / tag
    result = files.read_json(place / "phase_a.json") if (place / "phase_a.json").is_file() else {}
    if not any(place.glob("model_*.pt")) or not result and (place / "phase_a_begun.json").is_file():
        raise UserError(f"Phase A of arm {arm} is missing or not finished: expected at {place}; make it with: {remedy}")
    step = checkpoint_manager.find_last_step(str(place))
    meta = files.read_json(place / f"meta_{step:06d}.json")
    if not {"user_config", "total_batch_size"} <= set(meta):
        raise UserError(f"{place} was not made by nanochat's base_train: no user_config or batch in its metadata; make one with: {remedy}")
    tokens = step * meta["total_batch_size"]
    return PhaseA(arm, place, step, meta, {"tokens": tokens, "flops": tokens * accounting.flops_per_token(meta["model_config"]), **result})


class Learner:
    """Model, optimizer, recall and counters of one arm: `step` changes them, `state_dict` holds all of them."""

    COUNTERS = ("losses", "train_s", "eval_s", "count", "loss_sum", "idle_sum", "begun_s", "used")

    def __init__(self, phase_a: PhaseA, recipe: recipes.Recipe, batch_tokens: int, device: torch.device, seed: int):
        self.name, self.recipe, self.phase_a, self.device = phase_a.arm, recipe, phase_a, device
        place, meta, (rank, world_size) = phase_a.place, phase_a.meta, runs.ranks()
        load, shards = recipe.optimizer == "load", len(list(place.glob(f"optim_{phase_a.step:06d}_rank*.pt")))
        if load and shards != world_size:
            raise UserError(f"{place} has optimizer state of {shards} ranks, this run has {world_size}; use as many, or --optimizer reset")
        with torch.device("meta"):
            self.model = gpt.GPT(gpt.GPTConfig(**phase_a.config))
        self.model.to_empty(device=device)
        self.model.init_weights()
        try:
            model_data, optimizer_data, _ = checkpoint_manager.load_checkpoint(str(place), phase_a.step, device, load, rank)
            # Copied, not assigned: so the embeddings take this process's compute dtype, whatever machine the checkpoint comes from.
            self.model.load_state_dict(model_data, strict=True)
        except (OSError, RuntimeError, ValueError, KeyError) as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"the Phase A checkpoint {place}, step {phase_a.step}, can't be read ({reason}); make it again") from e
        self.optimizer = self.model.setup_optimizer(**recipes.phase_a_lrs(meta["user_config"], meta["total_batch_size"]), weight_decay=0.0)
        if load:
            self.optimizer.load_state_dict(optimizer_data)
        recipes.begin(self.optimizer, recipe, meta["total_batch_size"], batch_tokens)
        if arms.named(self.name).rows:
            plasticity.mark_rows(self.model, self.optimizer)
        self.sparse = phase_a.config.get("cl") is not None
        rule = plasticity.parse(recipe.plasticity)  # a budget of blocks means nothing to a dense model
        self.plastic = plasticity.begin(rule if self.sparse else replace(rule, budget=1.0), self.model, self.optimizer)
        routing.freeze(self.model, self.optimizer)
        self.compiled = torch.compile(self.model, dynamic=False)
        self.recall = Recall(PASSAGES, seed)
        self.losses: list[float] = []  # of the last steps
        self.train_s = self.eval_s = 0.0
        self.since_milestone()

    def since_milestone(self) -> None:
        """Start the counters of the next milestone."""
        self.count, self.loss_sum, self.idle_sum, self.begun_s = 0, 0.0, 0.0, self.train_s
        self.used = torch.zeros_like(routing.usage(self.model)) if self.sparse else None  # (L, R) tokens that each block served

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, rows: int, step: int, steps: int) -> None:
        """One optimizer step on this rank's part of the batch, inputs and targets (B, T), `rows` at a time."""
        start = time.perf_counter()
        self.model.train()
        if self.sparse:
            routing.reset_usage(self.model)
        pieces = list(zip(inputs.to(self.device).split(rows), targets.to(self.device).split(rows)))
        total = torch.zeros((), device=self.device)
        with machine.fixed_sums(self.device.type == "cpu"):
            for x, y in pieces:
                loss = self.compiled(x, y) / len(pieces)
                loss.backward()
                total += loss.detach()
        if self.sparse:
            used = runs.over_ranks(routing.usage(self.model), "sum")
            self.plastic(used)
            self.used, self.idle_sum = self.used + used, self.idle_sum + self._idle_share()
        recipes.set_step(self.optimizer, step, steps, self.recipe)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        loss = runs.over_ranks(total, "sum").item() / runs.ranks()[1]  # waits for the device, so the time is true
        self.losses = [*self.losses, loss][-MEMORY_STEPS:]
        self.count, self.loss_sum, self.train_s = self.count + 1, self.loss_sum + loss, self.train_s + time.perf_counter() - start

    def _idle_share(self) -> float:
        """Share of the (layer, routed block) pairs that this step leaves as they are, since no rank has a gradient for them."""
        mlps = [block.mlp for block in self.model.transformer.h]
        learned = torch.stack([mlp.c_fc.weight.grad[mlp.shared:].flatten(1).any(1) for mlp in mlps]).float()
        return plasticity.idle_share(runs.over_ranks(learned, "max")) if self.phase_a.config["cl"]["isolate"] else 0.0

    def trouble(self) -> str | None:
        """What is wrong with the last losses: not finite, or far above their running median."""
        *before, last = self.losses
        if not math.isfinite(last):
            return f"the loss is {last}"
        limit = statistics.median(before) + EXPLOSION_NATS if len(before) >= 2 * EXPLOSION_STEPS else math.inf
        if min(self.losses[-EXPLOSION_STEPS:]) > limit:
            return f"the loss exploded to {last:.2f}: {EXPLOSION_STEPS} steps above {limit:.2f}, the running median + {EXPLOSION_NATS} nats"
        return None

    def blocks(self) -> dict[str, Any] | None:
        """Use of the blocks since the last milestone; None for a dense model, or before the first step."""
        if not self.sparse or not self.count:
            return None
        return {"idle_share": self.idle_sum / self.count, "entropy": plasticity.entropy(self.used),
                "use": (self.used / self.used.sum(1, keepdim=True)).tolist()}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state is each rank's own, the model rank 0's."""
        model = self.model.state_dict() if runs.ranks()[0] == 0 else {}
        return {"model": model, "optimizer": self.optimizer.state_dict(), "recall": self.recall.state_dict(),
                **{key: getattr(self, key) for key in self.COUNTERS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"], strict=runs.ranks()[0] == 0)
        if dist.is_initialized():
            for tensor in self.model.state_dict().values():
                dist.broadcast(tensor, 0)
        self.optimizer.load_state_dict(state["optimizer"])
        self.recall.load_state_dict(state["recall"])
        for key in self.COUNTERS:
            setattr(self, key, state[key])
