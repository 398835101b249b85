"""
One arm as it learns in Phase B: a Phase A checkpoint, its optimizer begun anew by the recipe, and what it did since the last milestone.

B rows, T positions, L layers, R routed blocks.
"""
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nanochat import checkpoint_manager, common, gpt

from nanochat_cl import accounting, arms, files, isolation, lora, machine, metrics, plasticity, recipes, routing, runs
from nanochat_cl.command import UserError

MEMORY_STEPS = 64       # losses that the running median is taken of
EXPLOSION_NATS = 3.0    # above what is usual: from the 3 nats of a trained model to those of an untrained one
EXPLOSION_STEPS = 3     # in a row, since one batch of odd documents is no explosion


@dataclass(frozen=True)
class PhaseA:
    """The last checkpoint of a finished Phase A, not loaded yet."""
    arm: str
    place: Path
    step: int
    meta: dict[str, Any]    # as nanochat's base_train writes it
    result: dict[str, Any]  # phase_a.json; tokens and flops alone for a checkpoint that nanochat itself made
    seq_len: int = 0        # context of Phase B; 0: Phase A's

    @property
    def config(self) -> dict[str, Any]:
        config = self.meta["model_config"]
        return {**config, "sequence_len": self.seq_len or config["sequence_len"]}

    @property
    def cost(self) -> dict[str, float]:
        return cost({**self.config, "trained_len": self.meta["model_config"]["sequence_len"]})


def cost(config: Any) -> dict[str, float]:
    counts = accounting.params(config)
    return {"params_total": counts["total"], "params_active": counts["active"], "flops_per_token": accounting.flops_per_token(config)}


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


def working(model: torch.nn.Module, part: routing.Routed) -> int:
    """How many routed blocks of a part may work: not the reserve that is held back."""
    return part.routed - part.held + min(model.config.cl["released"], part.held)


class Learner:
    """Model, optimizer and counters of one arm: `step` changes them, `state_dict` holds all of them."""

    COUNTERS = ("losses", "train_s", "update_s", "update_ratio", "eval_s", "flops", "count", "loss_sum", "idle_sum", "covered", "begun_s",
                "used", "audited", "before")

    def __init__(self, phase_a: PhaseA, recipe: recipes.Recipe, batch_tokens: int, device: torch.device, seed: int, audit: bool = False):
        self.name, self.recipe, self.phase_a, self.device = phase_a.arm, recipe, phase_a, device
        place, meta, (rank, world_size) = phase_a.place, phase_a.meta, runs.ranks()
        load, shards = recipe.optimizer == "load", len(list(place.glob(f"optim_{phase_a.step:06d}_rank*.pt")))
        if load and shards != world_size:
            raise UserError(f"{place} has optimizer state of {shards} ranks, this run has {world_size}; use as many, or --optimizer reset")
        if audit and world_size > 1:
            raise UserError(f"--audit looks at whole gradients, and a rank has its share of them: expected one rank, got {world_size}")
        with torch.device("meta"):
            self.model = gpt.GPT(gpt.GPTConfig(**phase_a.config))
        self.model.config.trained_len = meta["model_config"]["sequence_len"]  # for accounting
        if phase_a.seq_len not in (0, self.model.config.trained_len):  # whole windows are of the new context, short ones stay as they were
            self.model.window_sizes = [(width, 0) for width in accounting.windows(self.model.config)]
        self.model.to_empty(device=device)
        self.model.init_weights()
        try:
            for name in [f"model_{phase_a.step:06d}", f"optim_{phase_a.step:06d}_rank{rank}"][:1 + load]:
                files.check_zip(place / f"{name}.pt")
            model_data, optimizer_data, _ = checkpoint_manager.load_checkpoint(str(place), phase_a.step, device, load, rank)
            # Copied, not assigned: so the embeddings take this process's compute dtype, whatever machine the checkpoint comes from.
            self.model.load_state_dict(model_data, strict=True)
        except (OSError, RuntimeError, ValueError, KeyError) as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"the Phase A checkpoint {place}, step {phase_a.step}, can't be read ({reason}); make it again") from e
        self.optimizer = self.model.setup_optimizer(**recipes.phase_a_lrs(meta["user_config"], meta["total_batch_size"]), weight_decay=0.0)
        if load:
            self.optimizer.load_state_dict(optimizer_data)
        arm, self.audited = arms.named(self.name), {"blocks": 0, "rows": 0} if audit else None
        if arm.lora:
            self.optimizer = lora.adapt(self.model, arm.lora, seed)
        recipes.begin(self.optimizer, recipe, meta["total_batch_size"], batch_tokens)
        if arm.rows:
            plasticity.mark_rows(self.model, self.optimizer)
        self.sparse = phase_a.config.get("cl") is not None
        self.general = {name: t.clone() for name, t in self.model.state_dict().items() if name.endswith(".usage")}  # steps count anew
        rule = plasticity.parse(recipe.plasticity)  # a budget of blocks means nothing to a dense model
        self.plastic = plasticity.begin(rule if self.sparse else replace(rule, budget=1.0), self.model, self.optimizer)
        routing.freeze(self.model, self.optimizer, rule.routers)
        self.compiled = torch.compile(self.model, dynamic=False)
        self.before: list[list[float]] = []  # nats and bytes of every passage that recall will ask for, with the Phase A model
        self.losses: list[float] = []  # of the last steps
        self.train_s = self.update_s = self.eval_s = self.flops = 0.0
        self.update_ratio: dict[str, float] | None = None  # of the last step before a milestone
        self.since_milestone()

    def since_milestone(self) -> None:
        """Start the counters of the next milestone."""
        self.count, self.loss_sum, self.begun_s = 0, 0.0, self.train_s
        kinds = routing.usage(self.model) if self.sparse else []
        self.used = [torch.zeros_like(kind) for kind in kinds]  # for each kind of part (L, R) tokens that each block served
        self.idle_sum, self.covered = [0.0] * len(kinds), torch.zeros(2)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, rows: int, step: int, steps: int, measured: bool = False) -> None:
        """One optimizer step on this rank's part of the batch, inputs and targets (B, T), `rows` at a time; measured: its update_ratio."""
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
        if self.sparse:  # this rank's own first, while the device still computes
            here = torch.stack([mask.float().mean() for mask in routing.coverage(inputs, self.model.config.cl)])
            used = [runs.over_ranks(kind, "sum") for kind in routing.usage(self.model)]
            self.plastic(used)
            self.used = [a + b for a, b in zip(self.used, used)]
            self.idle_sum = [a + b for a, b in zip(self.idle_sum, self._idle_shares())]  # after `plastic`, which zeroes gradients
            self.covered = self.covered + runs.over_ranks(here, "sum").to(self.covered) / runs.ranks()[1]
        loss = runs.over_ranks(total, "sum").item() / runs.ranks()[1]  # waits for the device, so the times are true
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()} if measured else {}
        begun = time.perf_counter()
        recipes.set_step(self.optimizer, step, steps, self.recipe)
        if self.audited is None:
            self.optimizer.step()
        else:
            self.audited = {key: self.audited[key] + now for key, now in isolation.audited_step(self.optimizer).items()}
        self.flops += accounting.flops_per_token(self.model.config) * inputs.numel() * runs.ranks()[1]
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.update_s += time.perf_counter() - begun
        if measured:
            self.update_ratio = metrics.change(before, dict(self.model.named_parameters()))
        self.losses = [*self.losses, loss][-MEMORY_STEPS:]
        self.count, self.loss_sum, self.train_s = self.count + 1, self.loss_sum + loss, self.train_s + time.perf_counter() - start

    def drift(self) -> tuple[dict[str, float], float | None]:
        """How far the weights are from Phase A's, by group, and the share of working routed blocks that are bit for bit what they were."""
        mlp = self.model.transformer.h[0].mlp
        path, now = self.phase_a.place / f"model_{self.phase_a.step:06d}.pt", lora.merged(self.model, dict(self.model.named_parameters()))
        then = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        unmoved = metrics.unmoved(then, now, mlp.shared, mlp.shared + working(self.model, mlp)) if self.sparse else None
        return metrics.change(then, now), unmoved

    def _idle_shares(self) -> list[float]:
        """
        For each kind of part, the share of (layer, block) pairs that this step leaves as they are, for no rank has a gradient for them;
        of those that may work.
        """
        grad = lambda part: getattr(part, "c_fc", part).weight.grad[part.shared:][:working(self.model, part)]
        learned = [torch.stack([grad(part).flatten(1).any(1) for part in kind]).float() for kind in routing.parts(self.model)]
        isolated = self.phase_a.config["cl"]["isolate"]
        return [1 - runs.over_ranks(kind, "max").mean().item() if isolated else 0.0 for kind in learned]

    def trouble(self) -> tuple[str, int] | None:
        """
        What is wrong with the last losses, not finite, or far above their running median (and the first, while it is in memory); and how many
        steps old the weights must be that are not under suspicion.
        """
        *before, last = self.losses
        if not math.isfinite(last):
            return f"the loss is {last}", 0
        if len(before) >= EXPLOSION_STEPS:
            usual = statistics.median(before)
            if len(self.losses) < MEMORY_STEPS:  # the first is still in memory, and Phase A's
                usual = min(usual, before[0])
            if min(self.losses[-EXPLOSION_STEPS:]) > usual + EXPLOSION_NATS:
                return (f"the loss exploded to {last:.2f}: {EXPLOSION_STEPS} steps more than {EXPLOSION_NATS} nats above the usual {usual:.2f}",
                        EXPLOSION_STEPS)
        return None

    def blocks(self) -> dict[str, Any] | None:
        """
        Use of the blocks since the last milestone, and under "heads" that of the heads where they are routed; shares of the trained tokens
        that were served under the constant choice and that their own document routed. None for a dense model, or before the first step.
        """
        if not self.sparse or not self.count:
            return None
        each = [{"idle_share": idle / self.count, "entropy": plasticity.entropy(used[:, :working(self.model, kind[0])]),
                 "use": (used / used.sum(1, keepdim=True)).tolist()}
                for idle, used, kind in zip(self.idle_sum, self.used, routing.parts(self.model))]
        constant, own = (self.covered / self.count).tolist()
        return {**each[0], "heads": each[1] if each[1:] else None, "released": self.model.config.cl["released"],
                "constant_share": constant, "own_share": own, "audited": self.audited}

    def kept(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Weights and config of a checkpoint that routes as this model does, wherever it is loaded; its counters `usage` are Phase A's."""
        config, weights = asdict(self.model.config), lora.merged(self.model, self.model.state_dict()) | self.general
        if self.sparse:
            config["cl"]["frozen"], weights["routing_embedding"] = True, self.model.routing_embedding
        return weights, config

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state is each rank's own, the model rank 0's."""
        model = self.model.state_dict() if runs.ranks()[0] == 0 else {}
        return {"model": model, "optimizer": self.optimizer.state_dict(),
                "released": self.model.config.cl["released"] if self.sparse else 0, **{key: getattr(self, key) for key in self.COUNTERS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"], strict=runs.ranks()[0] == 0)
        if dist.is_initialized():
            for tensor in self.model.state_dict().values():
                dist.broadcast(tensor, 0)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparse:
            routing.release(self.model, state["released"])
        for key in self.COUNTERS:
            setattr(self, key, state[key])
