"""
A Phase B that is under way: the arms, the stream they read and the exam they sit; one step, one milestone, one state to continue from.
"""
import hashlib
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nanochat import checkpoint_manager
from torch.utils._pytree import tree_leaves, tree_map_only

from nanochat_cl import files, growth, machine, metrics, plasticity, recall, routing, runs
from nanochat_cl.exam import Exam
from nanochat_cl.learner import Learner, cost
from nanochat_cl.recipes import multiplier
from nanochat_cl.stream import Stream

RECALL_WINDOWS = 16   # so many windows of the stream at most are asked for again
PASSAGES = 4          # of each window
MAX_SHARE = {"cpu": 0.2}  # of the training time, for scores and states at ordinary milestones; on GPUs 0.1
STALLED_S = 600.0     # that a batch may take to be read
ENDLESS = 2**40       # steps


@dataclass(frozen=True)
class Milestones:
    """The steps after which everything is scored: 0, every `milestone_tokens` snapped to the next whole step, and the last."""
    steps: int
    batch_tokens: int
    milestone_tokens: int

    def at(self, number: int) -> int:
        """The step of a milestone; 0 is Phase A."""
        return min(self.steps, -(-number * max(self.milestone_tokens, self.batch_tokens) // self.batch_tokens))

    def number(self, step: int) -> int | None:
        """The number of the milestone at a step, None where there is none."""
        number = self.last if step == self.steps else step * self.batch_tokens // max(self.milestone_tokens, self.batch_tokens)
        return number if self.at(number) == step else None

    @property
    def last(self) -> int:
        whole = self.steps * self.batch_tokens // max(self.milestone_tokens, self.batch_tokens)
        return whole + (self.at(whole) < self.steps)

    def full(self, number: int) -> bool:
        """At 0, 1, 2, 4, 8 .. and the last all is asked."""
        return number & (number - 1) == 0 or number == self.last

    def windows(self) -> list[int]:
        """The numbers of at most RECALL_WINDOWS: evenly up to the last, of an endless run 1, 2, 4, 8 .."""
        if self.steps == ENDLESS:
            return [2**i for i in range(RECALL_WINDOWS)]
        return list(range(self.last, 0, -math.ceil(self.last / RECALL_WINDOWS)))[::-1]


class PhaseB:
    """What lives during Phase B; `state` and the learners are what a continued run goes on from."""

    def __init__(self, args: Namespace, folder: Path, learners: list[Learner], stream: Stream, exam: Exam, steps: int, setting: dict):
        self.args, self.folder, self.learners, self.stream, self.exam, self.steps = args, folder, learners, stream, exam, steps
        self.setting = setting  # what else must be the same where runs are compared
        self.batch_tokens, self.rows = args.batch_tokens, args.sizes["device_batch_size"]
        self.marks = Milestones(steps, self.batch_tokens, args.sizes["milestone_tokens"])
        self.state: dict[str, Any] = {"step": 0, "stream_hash": hashlib.sha256().hexdigest(), "records": [],
                                      "checkpoint_s": 0.0, "data_s": 0.0}
        self.choices = {learner.name: self.routed(learner) for learner in learners if learner.sparse}
        self.constant = {learner.name: exam.constant_share(learner.model.config.cl) for learner in learners if learner.sparse}
        self.log, self.begun_s, self.begun_step, self.midway = None, time.perf_counter(), 0, False
        self.threads = ThreadPoolExecutor(2)  # one reads, one writes
        self.saving: tuple[Future, int, list[dict]] | None = None  # this rank's part of a state, its step and its records
        # What is asked of the stream later is known beforehand, since a batch is a function of its step.
        windows, self.passages = [self.marks.at(number) for number in self.marks.windows()], []
        for before, mark in zip([0, *windows], windows):
            batches = map(stream.batch, sorted({before + (mark - before) * i // PASSAGES for i in range(PASSAGES)}))
            rows = ((name, torch.cat([x, y[-1:]])) for b in batches for name, x, y in zip(b.subdomains, b.inputs, b.targets)
                    if name in exam.subdomains)
            self.passages += recall.sample(mark * self.batch_tokens, rows, PASSAGES, args.seed)

    def routed(self, learner: Learner) -> list[torch.Tensor]:
        """The blocks, and the heads where they are routed, that an arm chooses for some general text."""
        return routing.choices(learner.model, self.exam.routed.to(learner.device))

    def train(self) -> None:
        """One step: the same batch for every arm, for each rank its rows."""
        self.midway = True
        step, (rank, world_size) = self.state["step"], runs.ranks()
        start = time.perf_counter()
        try:
            batch = self.threads.submit(self.stream.batch, step).result(STALLED_S)
        except TimeoutError:
            where = self.where(f": rank {rank} waited {STALLED_S:g} s for its data")
            print(f"evolve | stopped at {where}; see to the disk, then the same command continues", file=sys.stderr, flush=True)
            os._exit(1)  # whatever that thread waits for
        self.state["data_s"] += time.perf_counter() - start
        digest = hashlib.sha256(bytes.fromhex(self.state["stream_hash"]))
        digest.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
        for learner in self.learners:
            if (milestone := self.marks.number(step)) is not None:
                growth.grow(learner.model, learner.recipe.release, learner.recipe.newcomers, milestone, batch.inputs.to(learner.device))
            inputs, targets = (rows[rank::world_size].contiguous() for rows in (batch.inputs, batch.targets))
            learner.step(inputs, targets, self.rows, step, self.steps, self.marks.number(step + 1) is not None)
            if trouble := learner.trouble():
                self.give_up(learner, *trouble)
        self.state.update(step=step + 1, stream_hash=digest.hexdigest())
        self.midway = False

    def compiling(self) -> bool:
        """In the first step since the start, of which the compiler takes minutes: what is saved is where it began. On one rank."""
        return self.midway and self.state["step"] == self.begun_step and runs.ranks()[1] == 1

    def where(self, what: str = "", bad: int = 0) -> str:
        """How far the run came, `what` happened there, and what it can go on from: the newest state that is `bad` steps old at least."""
        step = self.state["step"]
        saved = [s for s in runs.saved_steps(self.folder) if s <= step - bad]
        good = runs.place(self.folder, saved[-1]) if saved else self.learners[0].phase_a.place
        rows = [f"{name} token {token:,}" for name, token in self.stream.places(min(step, self.steps - 1))]
        return (f"step {step} ({step * self.batch_tokens:,} tokens){what}; the batch is {len(rows)} rows from {rows[0]} to {rows[-1]}; "
                f"last good checkpoint: {good}")

    def give_up(self, learner: Learner, reason: str, bad: int = 0) -> None:
        self.saved()
        runs.write(files.write_json, self.folder / "stopped.json", {
            "arm": learner.name, "recipe": learner.recipe.name, "lr_mult": learner.recipe.lr_mult, "seed": self.args.seed,
            "step": self.state["step"], "reason": reason})
        machine.say(f"evolve | stopped at {self.where(f': arm {learner.name}, {reason}', bad)}; try a lower --lr-mult under another --name")
        sys.exit(1)

    def score(self, pause: Callable[[], None]) -> None:
        """A record of every arm, samples at both ends, and what holds them: the state."""
        step, when = self.state["step"], "after" if self.state["step"] else "before"
        new = [self.record(learner, pause) for learner in self.learners]
        if step in (0, self.steps):
            path = self.folder / "samples.json"
            texts = [text for text in files.read_json(path) if text["when"] == "before"] if step and path.is_file() else []
            texts += [text for learner in self.learners for text in self.exam.samples(learner.model, learner.name, when)]
            runs.write(files.write_json, path, texts)
        for learner in self.learners:
            learner.since_milestone()
            self.keep_within(learner, [*self.state["records"], *new])
        self.state["records"] = self.state["records"] + new
        self.save()
        trained, most = sum(learner.train_s for learner in self.learners), self.most()
        share = metrics.light_share(self.state["records"]) + (self.state["checkpoint_s"] / trained if trained else 0.0)
        if share > most and new[0]["tier"] == "light" and self.state["step"] == self.marks.at(3):  # once, at the first of them
            machine.say(f"evolve | warning: ordinary milestones take {share:.0%} of the training time, expected at most {most:.0%}; raise "
                        f"--milestone-tokens, or lower --eval-docs or --probe-items under another --name")
        for r in new if self.log else ():
            self.log.log({"tokens": r["tokens"], **dict(numbers(r, r["arm"]))}, step=step)

    def most(self) -> float:
        """Share of the training time that scores and states may take at ordinary milestones."""
        return MAX_SHARE.get(self.learners[0].device.type, 0.1)

    def keep_within(self, learner: Learner, records: list[dict]) -> None:
        """With a floor guard: the arm's best model within it, where it is the newest, as a checkpoint that nanochat's own scripts load."""
        if self.args.floor_guard is None or (best := within(records, learner.name, self.args.floor_guard))["step"] != self.state["step"]:
            return
        place, step, (weights, config) = learner.phase_a.place.with_name(tag(self.args, learner.name)), best["step"], learner.kept()
        meta = {**learner.phase_a.meta, "step": step, "val_bpb": best["general"]["val"]["bpb"], "model_config": config}
        checkpoint_manager.save_checkpoint(str(place), step, weights, None, meta, runs.ranks()[0])
        if runs.ranks()[0] == 0:
            for older in {*place.glob("model_*"), *place.glob("meta_*")} - {*place.glob(f"*_{step:06d}.*")}:  # no longer the best
                older.unlink(missing_ok=True)
        runs.write(files.write_json, place / "phase_a.json", {**learner.phase_a.result, "phase_b_tokens": best["tokens"]})

    def record(self, learner: Learner, pause: Callable[[], None]) -> dict[str, Any]:
        """One line of records.jsonl."""
        start, step, stream, recipe, a = time.perf_counter(), self.state["step"], self.stream, learner.recipe, learner.phase_a
        tokens, costs = step * self.batch_tokens, cost(learner.model.config)
        if not all(bool(torch.isfinite(p).all()) for p in learner.model.parameters()):
            self.give_up(learner, "its weights are not finite")
        milestone = self.marks.number(step)
        full = self.marks.full(milestone)
        scores = self.exam.scores(learner.model, pause, full)
        if not all(math.isfinite(scores[part][split]["bpb"]) for part in ("domain", "general") for split in ("val", "test")):
            self.give_up(learner, "its scores are not finite")
        if step == 0:
            learner.before = recall.nats_and_bytes(learner.model, self.passages, self.exam.token_bytes).tolist()
        begun = next((r for r in self.state["records"] if r["arm"] == learner.name), scores)["domain"]["val"]["subdomains"]
        gained = {name: begun[name]["bpb"] - now["bpb"] for name, now in scores["domain"]["val"]["subdomains"].items()}
        recalled = recall.score(learner.model, self.passages, learner.before, tokens, gained, self.exam.token_bytes)
        blocks = learner.blocks()
        if blocks:
            agreed = [plasticity.agreement(*pair) for pair in zip(self.choices[learner.name], self.routed(learner))]
            blocks["agreement"] = agreed[0]
            if blocks["heads"]:
                blocks["heads"]["agreement"] = agreed[1]
        if full:
            scores["plasticity"]["drift"], unmoved = learner.drift()
            if blocks:
                blocks["unmoved"] = unmoved
        learner.eval_s += time.perf_counter() - start
        train_s, count = learner.train_s - learner.begun_s, learner.count
        tok_per_s = count * self.batch_tokens / train_s if train_s else 0.0
        # The rate of the step just made, so that a cooled-down end shows; before the first one, the peak.
        lr_mult = recipe.lr_mult * (multiplier(step - 1, self.steps, recipe) if step else 1.0)
        return {
            "run": self.args.name, "arm": learner.name, "seed": self.args.seed, "recipe": recipe.name, "milestone": milestone,
            "step": step, "tier": "full" if full else "light", "tokens": tokens,
            "unique_tokens": stream.unique_tokens(step), "epoch": stream.epoch(step),
            "flops": learner.flops, **costs, "phase_a_tokens": a.result["tokens"], "phase_a_flops": a.result["flops"],
            "phase_a_text": a.result.get("text"),
            "train_s": learner.train_s, "update_s": learner.update_s, "eval_s": learner.eval_s, "data_s": self.state["data_s"],
            "checkpoint_s": self.state["checkpoint_s"], "tok_per_s": tok_per_s,
            **machine.load(learner.device.type, costs["flops_per_token"] * tok_per_s / runs.ranks()[1]),
            "update_ratio": learner.update_ratio,
            "subdomain": stream.current(step - 1) if step else None, "seen": stream.seen(step),
            "train_loss": learner.loss_sum / count if count else None, "lr_mult": lr_mult, "stream_hash": self.state["stream_hash"],
            "final": step == self.steps, "confirmatory": self.args.confirmatory, "schedule": self.args.sizes["schedule"],
            "profile": self.args.profile, "setting": self.setting, **scores, "recall": recalled, "blocks": blocks,
            "constant_share": self.constant.get(learner.name, {})}

    def save(self) -> None:
        """Copy the state to main memory; this rank's part is written while training goes on, and counts when `saved` is through."""
        self.saved()
        start = time.perf_counter()
        learned = {each.name: tree_map_only(torch.Tensor, lambda t: t.to("cpu", copy=True), each.state_dict()) for each in self.learners}
        size = sum(leaf.nbytes for leaf in tree_leaves(learned) if isinstance(leaf, torch.Tensor))
        machine.check_disk(self.folder, int(runs.over_ranks(torch.tensor(size), "sum")))
        state = {**self.state, "arms": learned, "rng": torch.get_rng_state()}
        self.saving = self.threads.submit(runs.write_part, self.folder, state["step"], state), state["step"], state["records"]
        self.state["checkpoint_s"] += time.perf_counter() - start

    def saved(self, wait: bool = True) -> None:
        """Where all ranks have written their parts, or after waiting for them: the manifest, and then the records that the state holds."""
        start = time.perf_counter()
        if self.saving and (wait or not runs.over_ranks(torch.tensor(int(not self.saving[0].done())), "max")):
            (part, step, records), self.saving = self.saving, None
            runs.complete(self.folder, step, part.result(), self.branchable())
            runs.write(files.write_jsonl, self.folder / "records.jsonl", records)
        self.state["checkpoint_s"] += time.perf_counter() - start

    def branchable(self) -> set[int]:
        """Steps of the milestones 1, 2, 4, 8 .., whose states stay on request."""
        return {self.marks.at(2**i) for i in range(self.marks.last.bit_length())} if self.args.keep_milestones else set()

    def load(self, state: dict[str, Any]) -> None:
        learned = state.pop("arms")
        torch.set_rng_state(state.pop("rng").cpu())
        self.state, self.begun_step = state, state["step"]
        for learner in self.learners:
            learner.load_state_dict(learned[learner.name])

    def line(self) -> str:
        """Progress: what is done, where the stream is, the last losses and domain scores (bits per byte), speed, time spent and left."""
        step, now = self.state["step"], self.stream.current(max(self.state["step"] - 1, 0))
        spent, train_s = time.perf_counter() - self.begun_s, sum(learner.train_s for learner in self.learners)
        left = f", {spent / (step - self.begun_step) * (self.steps - step) / 60:.1f}m left" if step > self.begun_step else ", ? left"
        of = f"/{machine.short(self.steps * self.batch_tokens)} tokens {100 * step // self.steps}%"
        of, left = (" tokens", "") if self.steps == ENDLESS else (of, left)
        parts = [f"{machine.short(step * self.batch_tokens)}{of}",
                 f"{now} {self.stream.subdomains.index(now) + 1}/{len(self.stream.subdomains)}",
                 " ".join(f"{learner.name} {learner.losses[-1]:.3f}" for learner in self.learners if learner.losses),
                 "domain " + " ".join(f"{r['arm']} {r['domain']['val']['bpb']:.3f}" for r in self.state["records"][-len(self.learners):]),
                 f"{machine.short(step * self.batch_tokens / max(train_s, 1e-9))} tok/s", f"{spent / 60:.1f}m{left}"]
        return " | ".join(["evolve", *filter(None, parts)])

    def shares(self) -> str:
        """What the time of the run went into."""
        train_s, update_s, eval_s = (sum(getattr(learner, key) for learner in self.learners) for key in ("train_s", "update_s", "eval_s"))
        spent = {"data": self.state["data_s"], "forward and backward": train_s - update_s, "optimizer": update_s, "evaluation": eval_s,
                 "checkpoints": self.state["checkpoint_s"]}
        load = self.state["records"][-1]
        return ("evolve | time: " + ", ".join(f"{name} {s / sum(spent.values()):.0%}" for name, s in spent.items())
                + f"; ordinary milestones: evaluation {metrics.light_share(self.state['records']):.0%} of training (with checkpoints at most "
                f"{self.most():.0%})"
                + f"; peak memory {load['peak_memory_bytes'] / 1e9:.1f} GB" + (f", MFU {load['mfu']:.0%}" if "mfu" in load else ""))


def numbers(record: dict[str, Any], name: str) -> Iterator[tuple[str, float]]:
    """Every number of a record, as name/key/key."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{name}/{key}")
        elif isinstance(value, (int, float)):
            yield f"{name}/{key}", value


def tag(args: Namespace, arm: str) -> str:
    """Folder in base_checkpoints of the model that a floor guard keeps."""
    return f"{args.name}_{arm}_kept".replace("/", "_")


def kept(args: Namespace, records: list[dict]) -> list[str]:
    """With a floor guard: which model of each arm was kept, and how to sample from it."""
    guard, lines = args.floor_guard, []
    for name in args.arms if guard is not None else ():
        best = within(records, name, guard)
        lines.append(f"evolve | floor guard {guard:g}: the best {name} within it is milestone {best['milestone']}, {machine.short(best['tokens'])} "
                     f"tokens{'' if best['step'] else ' (Phase A itself)'}, domain {best['domain']['val']['bpb']:.3f} bpb; sample from it: "
                     f"python -m nanochat_cl.script scripts.base_eval --eval sample --model-tag {tag(args, name)}")
    return lines


def within(records: list[dict], arm: str, bound: float) -> dict:
    """The arm's record with the best domain score among those with a general bpb of at most `bound` above Phase A's; on val."""
    mine = [r for r in records if r["arm"] == arm]
    kept = [r for r in mine if r["general"]["val"]["bpb"] <= mine[0]["general"]["val"]["bpb"] + bound]
    return min(kept, key=lambda r: r["domain"]["val"]["bpb"])
