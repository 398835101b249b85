"""
Phase B: the arms learn one stream of domain text in lockstep, batch by batch the same, and are scored at every milestone.

python -m nanochat_cl.evolve --profile cpu --arms dense,cl --seed 42
torchrun --standalone --nproc_per_node=8 -m nanochat_cl.evolve -- --profile h100x8 --arms dense,cl

Writes <base>/evolve/<run>/: config.json, records.jsonl (a line per arm and milestone), samples.json, checkpoints/. The same command
continues a run that was stopped, however it was, and ends with the same records.
"""
import argparse
import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat_cl import command, crossover, domain, files, machine, patching, plasticity, routing, runs
from nanochat_cl.command import UserError
from nanochat_cl.exam import Exam
from nanochat_cl.profiles import PROFILES
from nanochat_cl.recipes import Recipe, multiplier
from nanochat_cl.stream import Stream

SIZES = {"domain": str, "schedule": str, "visit_tokens": int, "milestone_tokens": int, "max_tokens": int, "device_batch_size": int,
         "total_batch_size": int, "eval_docs": int, "probe_items": int}  # fields of a profile; a flag of that name wins
RECALL_WINDOWS = 16  # so many windows of the stream at most are asked for again
LINES = 64  # of progress


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nanochat_cl.evolve", description="Phase B: the arms on one stream of text", allow_abbrev=False)
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="sizes of the run (default: %(default)s)")
    parser.add_argument("--arms", default="dense,cl", help="names of nanochat_cl.arms, with commas (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the Phase A checkpoints and of the stream (default: %(default)s)")
    parser.add_argument("--name", help="of the run's folder (default: profile, domain, recipe and seed)")
    parser.add_argument("--depth", type=int, help="of the Phase A checkpoints (default: the profile's)")
    parser.add_argument("--from", dest="tag", help="for one arm: its folder in base_checkpoints (default: d<depth>_<arm>_s<seed>)")
    for name, kind in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="default: the profile's")
    parser.add_argument("--repeat", action="store_true", help="begin the stream again when it ends")
    for option in fields(Recipe):
        flag, kind = f"--{option.name.replace('_', '-')}", type(option.default)
        parser.add_argument(flag, type=kind, default=option.default, help=option.metadata["help"])
    parser.add_argument("--run", default="dummy", help="wandb run name; dummy disables wandb (default: %(default)s)")
    parser.add_argument("--device-type", choices=("", "cuda", "cpu", "mps"), default="", help="cuda, cpu or mps (default: what there is)")
    args = parser.parse_args(argv)
    args.argv, args.arms = sys.argv[1:] if argv is None else argv, args.arms.split(",")
    args.recipe = Recipe(**{option.name: getattr(args, option.name) for option in fields(Recipe)})
    args.sizes = {name: getattr(PROFILES[args.profile], name) if getattr(args, name) is None else getattr(args, name) for name in SIZES}
    return args


def milestones(steps: int, batch_tokens: int, milestone_tokens: int) -> list[int]:
    """The steps after which everything is scored: 0, every `milestone_tokens` snapped to the next whole step, and the last."""
    count = steps * batch_tokens // milestone_tokens
    return sorted({0, steps, *(math.ceil(k * milestone_tokens / batch_tokens) for k in range(1, count + 1))})


@contextmanager
def signals() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait until the block calls what it gets, on all ranks: there the state is whole, and there they are raised."""
    heard = [0]
    before = {number: signal.signal(number, lambda number, frame: heard.append(int(number))) for number in (signal.SIGINT, signal.SIGTERM)}

    def pause() -> None:
        number = int(runs.over_ranks(torch.tensor(max(heard)), "max"))
        if number:
            raise KeyboardInterrupt if number == signal.SIGINT else command.Terminated
    try:
        yield pause
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """What lives during Phase B; `state`, the learners and their recall are what a continued run goes on from."""

    def __init__(self, args: argparse.Namespace, folder: Path, learners: list, stream: Stream, exam: Exam, steps: int):
        self.args, self.folder, self.learners, self.stream, self.exam, self.steps = args, folder, learners, stream, exam, steps
        self.batch_tokens, self.rows = args.sizes["total_batch_size"], args.sizes["device_batch_size"]
        self.marks = milestones(steps, self.batch_tokens, args.sizes["milestone_tokens"])
        self.state: dict[str, Any] = {"step": 0, "stream_hash": hashlib.sha256().hexdigest(), "records": [], "checkpoint_s": 0.0}
        self.choices = {learner.name: self.routed(learner) for learner in learners if learner.sparse}
        self.log, self.begun_s, self.begun_step = None, time.perf_counter(), 0
        # What is asked of the stream later is known beforehand, since a batch is a function of its step.
        passages = learners[0].recall.sample_per_window
        windows = self.marks[:0:-math.ceil((len(self.marks) - 1) / RECALL_WINDOWS)][::-1]
        for before, mark in zip([0, *windows], windows):
            for step in sorted({before + (mark - before) * i // passages for i in range(passages)}):
                batch = stream.batch(step)
                for name in set(batch.subdomains) & set(exam.subdomains):
                    mine = [i for i, other in enumerate(batch.subdomains) if other == name]
                    for learner in learners:
                        learner.recall.add(mark * self.batch_tokens, name, torch.cat([batch.inputs[mine], batch.targets[mine, -1:]], dim=1))

    def routed(self, learner) -> torch.Tensor:
        """The blocks that an arm chooses for some general text."""
        return routing.choices(learner.model, self.exam.routed.to(learner.device))

    def train(self) -> None:
        """One step: the same batch for every arm, for each rank its rows."""
        step, (rank, world_size) = self.state["step"], runs.ranks()
        batch = self.stream.batch(step)
        digest = hashlib.sha256(bytes.fromhex(self.state["stream_hash"]))
        digest.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
        for learner in self.learners:
            learner.step(batch.inputs[rank::world_size], batch.targets[rank::world_size], self.rows, step, self.steps)
            if reason := learner.trouble():
                (first, a), (last, b) = batch.rows[0], batch.rows[-1]
                self.give_up(learner, f"{reason}; the batch is {len(batch.rows)} rows from {first} token {a:,} to {last} token {b:,}")
        self.state.update(step=step + 1, stream_hash=digest.hexdigest())

    def give_up(self, learner, reason: str) -> None:
        step, saved = self.state["step"], runs.saved_steps(self.folder)
        good = runs.place(self.folder, saved[-1]) if saved else learner.phase_a.place
        machine.say(f"evolve | stopped at step {step} ({step * self.batch_tokens:,} tokens): arm {learner.name}, {reason}; "
                    f"last good checkpoint: {good}; try a lower --lr-mult under another --name")
        sys.exit(1)

    def score(self, pause: Callable[[], None]) -> None:
        """A record of every arm, samples at both ends, the state; then records.jsonl: with its last record all is there."""
        step, when = self.state["step"], "after" if self.state["step"] else "before"
        new = [self.record(learner, pause) for learner in self.learners]
        if step in (0, self.steps):
            texts = [text for text in files.read_json(self.folder / "samples.json") if text["when"] == "before"] if step else []
            texts += [text for learner in self.learners for text in self.exam.samples(learner.model, learner.name, when)]
            write(files.write_json, self.folder / "samples.json", texts)
        for learner in self.learners:
            learner.since_milestone()
        self.state["records"] = self.state["records"] + new
        self.save()
        write(files.write_jsonl, self.folder / "records.jsonl", self.state["records"])
        for r in new if self.log else ():
            shown = {"domain_bpb": r["domain"]["val"]["bpb"], "general_bpb": r["general"]["val"]["bpb"], "recall_bpb": r["recall"]["mean"],
                     **{key: r[key] for key in ("train_loss", "flops", "train_s", "eval_s", "tok_per_s")}}
            self.log.log({"tokens": r["tokens"], **{f"{r['arm']}/{key}": value for key, value in shown.items()}}, step=step)

    def record(self, learner, pause: Callable[[], None]) -> dict[str, Any]:
        """One line of records.jsonl."""
        start, step, stream, recipe, a = time.perf_counter(), self.state["step"], self.stream, self.args.recipe, learner.phase_a
        tokens, cost = step * self.batch_tokens, a.cost
        if not all(bool(torch.isfinite(p).all()) for p in learner.model.parameters()):
            self.give_up(learner, "its weights are not finite")
        scores = self.exam.scores(learner.model, pause)
        if step == 0:
            learner.recall.baseline(learner.model, self.exam.token_bytes)
        begun = next((r for r in self.state["records"] if r["arm"] == learner.name), scores)["domain"]["val"]["subdomains"]
        gained = {name: begun[name]["bpb"] - now["bpb"] for name, now in scores["domain"]["val"]["subdomains"].items()}
        recalled, blocks = learner.recall.score(learner.model, tokens, gained, self.exam.token_bytes), learner.blocks()
        if blocks:
            blocks["agreement"] = plasticity.agreement(self.choices[learner.name], self.routed(learner))
        learner.eval_s += time.perf_counter() - start
        train_s, count = learner.train_s - learner.begun_s, learner.count
        # The rate of the step just made, so that a cooled-down end shows; before the first one, the peak.
        lr_mult = recipe.lr_mult * (multiplier(step - 1, self.steps, recipe) if step else 1.0)
        return {
            "run": self.args.name, "arm": learner.name, "seed": self.args.seed, "recipe": recipe.name, "milestone": self.marks.index(step),
            "step": step, "tokens": tokens, "unique_tokens": stream.unique_tokens(step), "epoch": stream.epoch(step),
            "flops": cost["flops_per_token"] * tokens, **cost, "phase_a_tokens": a.result["tokens"], "phase_a_flops": a.result["flops"],
            "train_s": learner.train_s, "eval_s": learner.eval_s, "checkpoint_s": self.state["checkpoint_s"],
            "tok_per_s": count * self.batch_tokens / train_s if train_s else 0.0,
            "subdomain": stream.current(step - 1) if step else None, "seen": stream.seen(step),
            "train_loss": learner.loss_sum / count if count else None, "lr_mult": lr_mult, "stream_hash": self.state["stream_hash"],
            "final": step == self.steps, "confirmatory": False, "schedule": self.args.sizes["schedule"], "profile": self.args.profile,
            **scores, "recall": recalled, "blocks": blocks, "constant_share": self.exam.constant_share}

    def save(self) -> None:
        start = time.perf_counter()
        learned = {learner.name: learner.state_dict() for learner in self.learners}
        runs.save_state(self.folder, self.state["step"], {**self.state, "arms": learned, "rng": torch.get_rng_state()})
        self.state["checkpoint_s"] += time.perf_counter() - start

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
        left = f"{spent / (step - self.begun_step) * (self.steps - step) / 60:.1f}m" if step > self.begun_step else "?"
        parts = [f"{short(step * self.batch_tokens)}/{short(self.steps * self.batch_tokens)} tokens {100 * step // self.steps}%",
                 f"{now} {self.stream.subdomains.index(now) + 1}/{len(self.stream.subdomains)}",
                 " ".join(f"{learner.name} {learner.losses[-1]:.3f}" for learner in self.learners if learner.losses),
                 "domain " + " ".join(f"{r['arm']} {r['domain']['val']['bpb']:.3f}" for r in self.state["records"][-len(self.learners):]),
                 f"{short(step * self.batch_tokens / max(train_s, 1e-9))} tok/s", f"{spent / 60:.1f}m, {left} left"]
        return " | ".join(["evolve", *filter(None, parts)])


def h1(records: list[dict]) -> str:
    """The H1 check on both Phase A checkpoints: is Model-Dense the better one before Phase B?"""
    found = crossover.assess(records)
    gap, general = found["parts"]["gap"], found["general_start"]
    return (f"evolve | H1 check, cl - dense (score = -bpb, 95 % over {found['over']}): domain {crossover.interval(gap)}, "
            f"general {crossover.interval(general)}: {dict(fail='fails: cl starts level or above', open='open').get(gap['state'], 'holds')}")


def short(count: float) -> str:
    """412k, 31.5M."""
    size, letter = next(((size, letter) for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= size), (1, ""))
    return f"{count / size:.1f}".removesuffix(".0") + letter


def write(how: Callable, path: Path, value: Any) -> None:
    """Files of the run are rank 0's."""
    if runs.ranks()[0] == 0:
        how(path, value)


def begin(args: argparse.Namespace) -> Run | None:
    """All that can be refused is refused here, before anything is written. None when the run is complete."""
    from nanochat import common

    from nanochat_cl import learner, pretrain, tokenizer
    sizes, recipe, base = args.sizes, args.recipe, Path(common.get_base_dir())
    if len(set(args.arms)) < len(args.arms) or args.tag and len(args.arms) > 1:
        raise UserError(f"--arms names different arms, and one only with --from; got {', '.join(args.arms)}")
    if bad := [f"{name} {value}" for name, value in sizes.items() if not value or isinstance(value, int) and value < 0]:
        raise UserError(f"sizes must be positive, got {', '.join(bad)}")
    try:
        ddp, _, _, world_size, device = common.compute_init(args.device_type or common.autodetect_device_type())
    except AssertionError as e:
        raise UserError(f"no device {args.device_type} here ({e}); leave out --device-type to use what there is") from e
    if ddp and not dist.is_initialized():
        dist.init_process_group("gloo")  # nanochat makes a group on GPUs only
    vocabulary, token_bytes = tokenizer.load(args.profile)

    depth = args.depth or pretrain.parse(["--profile", args.profile]).depth
    remedy = f"python -m nanochat_cl.pretrain --profile {args.profile} --seed {args.seed}" + (f" --depth {depth}" if args.depth else "")
    found = [learner.find(name, args.tag or f"d{depth}_{name}_s{args.seed}", f"{remedy} --arm {name}") for name in args.arms]
    shapes = {a.arm: (a.config["sequence_len"], a.config["vocab_size"]) for a in found}
    seq_len, batch_tokens = found[0].config["sequence_len"], sizes["total_batch_size"]
    if set(shapes.values()) != {(seq_len, vocabulary.get_vocab_size())}:
        raise UserError(f"the arms need one context length and the tokenizer's vocabulary of {vocabulary.get_vocab_size()}, got {shapes}")
    runs.check_batch(batch_tokens, sizes["device_batch_size"] * seq_len * world_size)
    steps = sizes["max_tokens"] // batch_tokens
    if not steps:
        raise UserError(f"--max-tokens {sizes['max_tokens']:,} is less than one batch of {batch_tokens:,}")

    name = domain.name_of(sizes["domain"])
    args.name = args.name or f"{args.profile}_{name}_{recipe.name}_s{args.seed}"
    folder, corpus = base / "evolve" / args.name, base / "corpora" / name
    asked = {"profile": args.profile, "arms": args.arms, "seed": args.seed, **sizes, "repeat": args.repeat, "recipe": vars(recipe),
             "seq_len": seq_len, "ranks": world_size, "device": device.type, "dtype": str(common.COMPUTE_DTYPE),
             "phase_a": {a.arm: {"checkpoint": a.place.name, "step": a.step, "config": a.config} for a in found}}
    if (folder / "config.json").is_file():
        runs.check_same(folder, files.read_json(folder / "config.json")["asked"], asked, "give its flags, or another --name")
    records = files.read_jsonl(folder / "records.jsonl") if (folder / "records.jsonl").is_file() else []
    if sum(record["final"] for record in records) == len(found):
        machine.say(f"evolve | complete: {len(records)} records in {folder / 'records.jsonl'}; {what_next(args, folder)}")
        return None
    states = runs.KEEP + 1 - len(runs.saved_steps(folder))
    machine.check_disk(folder, 12 * states * sum(a.cost["params_total"] for a in found))  # fp32 weights and two moments, at most
    stream = Stream(corpus, vocabulary, sizes["schedule"], args.seed, batch_tokens // seq_len, seq_len, sizes["visit_tokens"],
                    args.repeat, replay=recipe.replay, max_tokens=steps * batch_tokens)
    exam = Exam(corpus, vocabulary, token_bytes, seq_len, sizes["device_batch_size"], sizes["eval_docs"], sizes["probe_items"])
    run = Run(args, folder, [learner.Learner(a, recipe, batch_tokens, device, args.seed) for a in found], stream, exam, steps)
    if not (folder / "config.json").is_file():
        write(files.write_json, folder / "config.json", {
            "run": args.name, "argv": ["python", "-m", "nanochat_cl.evolve", *args.argv], "profile": args.profile, "asked": asked,
            "steps": steps, "milestones": run.marks, "machine": machine.describe(),
            "arms": {a.arm: {**a.cost, "cl": a.config.get("cl"), "phase_a": a.result} for a in found}})
    if state := runs.load_state(folder, device):
        run.load(state)
        write(files.write_jsonl, folder / "records.jsonl", run.state["records"])
    if args.run != "dummy" and runs.ranks()[0] == 0:
        import wandb
        run_id = hashlib.sha256(str(folder).encode()).hexdigest()[:16]  # a continued run continues its curve
        run.log = wandb.init(project="nanochat_cl", name=args.run, id=run_id, resume="allow", dir=str(folder), config=asked)
    machine.say(f"evolve | {', '.join(args.arms)} s{args.seed}, recipe {recipe.name}: {steps:,} steps of {short(batch_tokens)} tokens of "
                f"{name} ({sizes['schedule']}), {len(run.marks)} milestones, from "
                f"{'step ' + str(run.state['step']) if state else 'Phase A'} -> {folder}")
    return run


def what_next(args: argparse.Namespace, folder: Path) -> str:
    """The commands that read the records."""
    readers = ["crossover", "report"] if len(args.arms) > 1 else ["report"]
    return "next: " + ", then ".join(f"python -m nanochat_cl.{reader} {folder}" for reader in readers)


def evolve(args: argparse.Namespace) -> None:
    with patching.applied():
        run = begin(args)
        if run is None:
            return
        with signals() as pause:
            try:
                while True:
                    step = run.state["step"]
                    if step in run.marks and not any(record["step"] == step for record in run.state["records"]):
                        run.score(pause)
                        if step == 0 and {"dense", "cl"} <= set(args.arms):
                            machine.say(h1(run.state["records"]))
                        machine.say(run.line())
                    elif step % max(1, run.steps // LINES) == 0:
                        machine.say(run.line())
                    if step == run.steps:
                        break
                    pause()
                    run.train()
            except (KeyboardInterrupt, command.Terminated):
                run.save()
                raise
    train_s, eval_s = (sum(getattr(learner, key) for learner in run.learners) for key in ("train_s", "eval_s"))
    whole_s = train_s + eval_s + run.state["checkpoint_s"]
    machine.say(f"evolve | {len(run.state['records'])} records in {run.folder / 'records.jsonl'}; {eval_s / whole_s:.0%} of the time was "
                f"evaluation, {run.state['checkpoint_s'] / whole_s:.0%} checkpoints; {what_next(args, run.folder)}")
    if run.log:
        run.log.finish()
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine.prepare()
    evolve(args)


if __name__ == "__main__":
    command.run(main)
