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
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only

from nanochat_cl import arms, command, crossover, domain, files, lora, machine, metrics, patching, plasticity, routing, runs
from nanochat_cl.command import UserError
from nanochat_cl.exam import Exam
from nanochat_cl.profiles import PROFILES
from nanochat_cl.recipes import Recipe, multiplier, of_arm
from nanochat_cl.stream import Stream

SIZES = {"domain": str, "schedule": str, "visit_tokens": int, "milestone_tokens": int, "max_tokens": int, "device_batch_size": int,
         "total_batch_size": int, "eval_docs": int, "probe_items": int}  # fields of a profile; a flag of that name wins
RECALL_WINDOWS = 16  # so many windows of the stream at most are asked for again
LINES = 64  # of progress
MAX_EVAL_SHARE = 0.2  # of training time for what is scored at every milestone
STALLED_S = 600.0  # that a batch may take to be read


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
    parser.add_argument("--max-seq-len", type=int, default=0, help="context in tokens (default: Phase A's)")
    parser.add_argument("--repeat", action="store_true", help="begin the stream again when it ends")
    for option in fields(Recipe):
        flag, kind = f"--{option.name.replace('_', '-')}", type(option.default)
        parser.add_argument(flag, type=kind, default=option.default, help=option.metadata["help"])
    parser.add_argument("--audit", action="store_true", help="check at every step that what got no gradient keeps every bit (slower)")
    parser.add_argument("--floor-guard", type=float, help="keep the best checkpoint that lost at most so many bpb of general text")
    parser.add_argument("--keep-milestones", action="store_true", help="keep the states at milestones 1, 2, 4, 8 .., to branch from")
    parser.add_argument("--confirmatory", action="store_true", help="declare: nothing was ever chosen on this domain, its split and seed")
    parser.add_argument("--branch-of", metavar="RUN", help="begin where a run of the same configuration, but for --lr-schedule, "
                        "--cooldown-frac and --max-tokens (one of its milestones), was the same: a cool-down from there leaves that run alone")
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
        self.full = [step for i, step in enumerate(self.marks) if i & (i - 1) == 0 or step == steps]  # 0, 1, 2, 4, 8 ..: all is asked
        self.state: dict[str, Any] = {"step": 0, "stream_hash": hashlib.sha256().hexdigest(), "records": [],
                                      "checkpoint_s": 0.0, "data_s": 0.0}
        self.choices = {learner.name: self.routed(learner) for learner in learners if learner.sparse}
        self.log, self.begun_s, self.begun_step = None, time.perf_counter(), 0
        self.threads = ThreadPoolExecutor(2)  # one reads, one writes
        self.saving: tuple[Future, int, list[dict]] | None = None  # this rank's part of a state, its step and its records
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
            if step in self.marks:
                learner.grow(self.marks.index(step), batch.inputs)
            inputs, targets = batch.inputs[rank::world_size], batch.targets[rank::world_size]
            learner.step(inputs, targets, self.rows, step, self.steps, step + 1 in self.marks)
            if reason := learner.trouble():
                self.give_up(learner, reason)
        self.state.update(step=step + 1, stream_hash=digest.hexdigest())

    def where(self, what: str = "") -> str:
        """How far the run came, `what` happened there, and what it can go on from."""
        step, saved = self.state["step"], runs.saved_steps(self.folder)
        good = runs.place(self.folder, saved[-1]) if saved else self.learners[0].phase_a.place
        rows = [f"{name} token {token:,}" for name, token in self.stream.places(min(step, self.steps - 1))]
        return (f"step {step} ({step * self.batch_tokens:,} tokens){what}; the batch is {len(rows)} rows from {rows[0]} to {rows[-1]}; "
                f"last good checkpoint: {good}")

    def give_up(self, learner, reason: str) -> None:
        self.saved()
        machine.say(f"evolve | stopped at {self.where(f': arm {learner.name}, {reason}')}; try a lower --lr-mult under another --name")
        sys.exit(1)

    def score(self, pause: Callable[[], None]) -> None:
        """A record of every arm, samples at both ends, and what holds them: the state."""
        step, when = self.state["step"], "after" if self.state["step"] else "before"
        new = [self.record(learner, pause) for learner in self.learners]
        if step in (0, self.steps):
            texts = [text for text in files.read_json(self.folder / "samples.json") if text["when"] == "before"] if step else []
            texts += [text for learner in self.learners for text in self.exam.samples(learner.model, learner.name, when)]
            write(files.write_json, self.folder / "samples.json", texts)
        for learner in self.learners:
            learner.since_milestone()
            self.keep_within(learner, [*self.state["records"], *new])
        self.state["records"] = self.state["records"] + new
        self.save()
        share = metrics.light_share(self.state["records"])
        if share > MAX_EVAL_SHARE and new[0]["tier"] == "light" and self.state["step"] == self.marks[3]:  # once, at the first of them
            machine.say(f"evolve | warning: at ordinary milestones evaluation takes {share:.0%} of the training time, expected at most "
                        f"{MAX_EVAL_SHARE:.0%}; raise --milestone-tokens, or lower --eval-docs or --probe-items under another --name")
        for r in new if self.log else ():
            shown = {"domain_bpb": r["domain"]["val"]["bpb"], "general_bpb": r["general"]["val"]["bpb"], "recall_bpb": r["recall"]["mean"],
                     **{key: r[key] for key in ("train_loss", "flops", "train_s", "eval_s", "tok_per_s")}, **self.load_of(r)}
            self.log.log({"tokens": r["tokens"], **{f"{r['arm']}/{key}": value for key, value in shown.items()}}, step=step)

    def load_of(self, r: dict) -> dict[str, float]:
        """Memory and MFU: a continued run has others, so they are in no record."""
        return machine.load(self.learners[0].device.type, r["flops_per_token"] * r["tok_per_s"] / runs.ranks()[1])

    def keep_within(self, learner, records: list[dict]) -> None:
        """With a floor guard: the arm's best model within it, where it is the newest, as a checkpoint that nanochat's own scripts load."""
        from nanochat import checkpoint_manager
        if self.args.floor_guard is None or (best := within(records, learner.name, self.args.floor_guard))["step"] != self.state["step"]:
            return
        place, step = learner.phase_a.place.with_name(f"{self.args.name}_{learner.name}_kept"), best["step"]
        config, val_bpb = asdict(learner.model.config), best["general"]["val"]["bpb"]
        meta = {**learner.phase_a.meta, "step": step, "val_bpb": val_bpb, "model_config": config}
        weights = lora.merged(learner.model, learner.model.state_dict())
        checkpoint_manager.save_checkpoint(str(place), step, weights, None, meta, runs.ranks()[0])
        for older in {*place.glob("*.*")} - {*place.glob(f"*_{step:06d}.*")}:  # no longer the best
            older.unlink(missing_ok=True)

    def record(self, learner, pause: Callable[[], None]) -> dict[str, Any]:
        """One line of records.jsonl."""
        from nanochat_cl.learner import cost
        start, step, stream, recipe, a = time.perf_counter(), self.state["step"], self.stream, learner.recipe, learner.phase_a
        tokens, costs = step * self.batch_tokens, cost(learner.model.config)
        if not all(bool(torch.isfinite(p).all()) for p in learner.model.parameters()):
            self.give_up(learner, "its weights are not finite")
        milestone = self.marks.index(step)
        full = step in self.full
        scores = self.exam.scores(learner.model, pause, full)
        if step == 0:
            learner.recall.baseline(learner.model, self.exam.token_bytes)
        begun = next((r for r in self.state["records"] if r["arm"] == learner.name), scores)["domain"]["val"]["subdomains"]
        gained = {name: begun[name]["bpb"] - now["bpb"] for name, now in scores["domain"]["val"]["subdomains"].items()}
        recalled, blocks = learner.recall.score(learner.model, tokens, gained, self.exam.token_bytes), learner.blocks()
        if blocks:
            blocks["agreement"] = plasticity.agreement(self.choices[learner.name], self.routed(learner))
        if full:
            scores["plasticity"]["drift"], unmoved = learner.drift()
            blocks = blocks and blocks | {"unmoved": unmoved}
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
            "train_s": learner.train_s, "update_s": learner.update_s, "eval_s": learner.eval_s, "data_s": self.state["data_s"],
            "checkpoint_s": self.state["checkpoint_s"], "tok_per_s": tok_per_s,
            "update_ratio": learner.update_ratio,
            "subdomain": stream.current(step - 1) if step else None, "seen": stream.seen(step),
            "train_loss": learner.loss_sum / count if count else None, "lr_mult": lr_mult, "stream_hash": self.state["stream_hash"],
            "final": step == self.steps, "confirmatory": self.args.confirmatory, "schedule": self.args.sizes["schedule"],
            "profile": self.args.profile, **scores, "recall": recalled, "blocks": blocks, "constant_share": self.exam.constant_share}

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
            runs.complete(self.folder, step, part.result(), self.full[1:] if self.args.keep_milestones else ())
            write(files.write_jsonl, self.folder / "records.jsonl", records)
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


def within(records: list[dict], arm: str, bound: float) -> dict:
    """The arm's record with the best domain score among those with a general bpb of at most `bound` above Phase A's; on val."""
    mine = [r for r in records if r["arm"] == arm]
    kept = [r for r in mine if r["general"]["val"]["bpb"] <= mine[0]["general"]["val"]["bpb"] + bound]
    return min(kept, key=lambda r: r["domain"]["val"]["bpb"])


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
    if (args.floor_guard or 0) < 0:
        raise UserError(f"--floor-guard is how many bpb of general text may be lost, 0 or more, got {args.floor_guard}")
    if bad := [f"{name} {value}" for name, value in sizes.items() if not value or isinstance(value, int) and value < 0]:
        raise UserError(f"sizes must be positive, got {', '.join(bad)}")
    try:
        *_, world_size, device = common.compute_init(args.device_type or common.autodetect_device_type())
    except AssertionError as e:
        raise UserError(f"no device {args.device_type} here ({e}); leave out --device-type to use what there is") from e
    vocabulary, token_bytes = tokenizer.load(args.profile)

    depth = args.depth or pretrain.parse(["--profile", args.profile]).depth
    remedy = f"python -m nanochat_cl.pretrain --profile {args.profile} --seed {args.seed}" + (f" --depth {depth}" if args.depth else "")
    begun = {name: arms.named(name).phase_a or name for name in args.arms}
    found = [learner.find(name, args.tag or f"d{depth}_{begun[name]}_s{args.seed}", f"{remedy} --arm {begun[name]}") for name in args.arms]
    shapes = {a.arm: (a.config["sequence_len"], a.config["vocab_size"]) for a in found}
    seq_len, batch_tokens = found[0].config["sequence_len"], sizes["total_batch_size"]
    if set(shapes.values()) != {(seq_len, vocabulary.get_vocab_size())}:
        raise UserError(f"the arms need one context length and the tokenizer's vocabulary of {vocabulary.get_vocab_size()}, got {shapes}")
    seq_len = args.max_seq_len or seq_len
    found = [replace(a, seq_len=seq_len) for a in found]
    own = {a: of_arm(recipe, arms.named(a).recipe) for a in args.arms}
    if len(replays := {mine.replay for mine in own.values()}) > 1:
        raise UserError(f"arms of one run read one stream, and {', '.join(f'{a} replays {mine.replay:g}' for a, mine in own.items())}: "
                        f"give each share of replay a run of its own; crossover pools them")
    runs.check_batch(batch_tokens, sizes["device_batch_size"] * seq_len * world_size)
    steps = sizes["max_tokens"] // batch_tokens
    if not steps:
        raise UserError(f"--max-tokens {sizes['max_tokens']:,} is less than one batch of {batch_tokens:,}")

    name = domain.name_of(sizes["domain"])
    if args.confirmatory and name == PROFILES["cpu"].domain:
        raise UserError(f"--confirmatory is for a domain on which nothing was chosen, and on {name} everything is: give another --domain")
    args.name = args.name or f"{args.profile}_{name}_{recipe.name}_s{args.seed}"
    folder, corpus = base / "evolve" / args.name, base / "corpora" / name
    asked = {**{key: getattr(args, key) for key in ("profile", "arms", "seed", "repeat", "audit", "confirmatory")}, **sizes,
             "recipe": vars(recipe), "seq_len": seq_len, "ranks": world_size, "device": device.type, "dtype": str(common.COMPUTE_DTYPE),
             "phase_a": {a.arm: {"checkpoint": a.place.name, "step": a.step, "config": a.config} for a in found}}
    if (folder / "config.json").is_file():
        runs.check_same(folder, files.read_json(folder / "config.json")["asked"], asked, "give its flags, or another --name")
    records = files.read_jsonl(folder / "records.jsonl") if (folder / "records.jsonl").is_file() else []
    if sum(record["final"] for record in records) == len(found):
        machine.say(f"evolve | complete: {len(records)} records in {folder / 'records.jsonl'}; {what_next(args, folder)}")
        return None
    marks = (steps * batch_tokens // sizes["milestone_tokens"]).bit_length() if args.keep_milestones else 0
    states = runs.KEEP + 1 + marks - len(runs.saved_steps(folder))
    machine.check_disk(folder, 12 * states * sum(a.cost["params_total"] for a in found))  # fp32 weights and two moments, at most
    stream = Stream(corpus, vocabulary, sizes["schedule"], args.seed, batch_tokens // seq_len, seq_len, sizes["visit_tokens"],
                    args.repeat, replay=replays.pop(), max_tokens=steps * batch_tokens)
    exam = Exam(corpus, vocabulary, token_bytes, seq_len, sizes["device_batch_size"], sizes["eval_docs"], sizes["probe_items"])
    learners = [learner.Learner(a, own[a.arm], batch_tokens, device, args.seed, args.audit) for a in found]
    run = Run(args, folder, learners, stream, exam, steps)
    state = runs.load_state(folder, device)
    if state is None and args.branch_of:
        state = branch(run, base / "evolve" / args.branch_of, asked, device)
    if not (folder / "config.json").is_file():
        write(files.write_json, folder / "config.json", {
            "run": args.name, "argv": ["python", "-m", "nanochat_cl.evolve", *args.argv], "profile": args.profile, "asked": asked,
            "steps": steps, "milestones": run.marks, "machine": machine.describe(),
            "arms": {a.arm: {**a.cost, "cl": a.config.get("cl"), "phase_a": a.result} for a in found}})
    if state:
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


def branch(run: Run, trunk: Path, asked: dict, device: torch.device) -> dict:
    """The trunk's last state up to which `run`, at Phase A still, does what the trunk did: then it ends as if it had run from the start."""
    if not (trunk / "config.json").is_file():
        raise UserError(f"--branch-of names a run, and there is none at {trunk}")
    config, free = files.read_json(trunk / "config.json"), {"lr_schedule": None, "cooldown_frac": None}
    without = lambda asked: {**asked, "max_tokens": None, "recipe": asked["recipe"] | free}
    runs.check_same(trunk, without(config["asked"]), without(asked), "a branch differs in --lr-schedule, --cooldown-frac and --max-tokens")
    recipe, theirs = run.args.recipe, Recipe(**config["asked"]["recipe"])
    same = [multiplier(s, run.steps, recipe) == multiplier(s, config["steps"], theirs) for s in range(min(run.steps, config["steps"]))]
    state = runs.load_state(trunk, device, lambda step: step < run.steps in config["milestones"] and all(same[:step]))
    if state is None:
        raise UserError(f"{trunk} holds no state to branch from: its states are at steps {runs.saved_steps(trunk)}, the rates agree up to step "
                        f"{(same + [False]).index(False)}, and the end, step {run.steps}, must be one of {config['milestones']}")
    for learner in run.learners:  # the passages asked for depend on the end
        learner.recall.baseline(learner.model, run.exam.token_bytes)
        state["arms"][learner.name]["recall"] = learner.recall.state_dict()
    names = {learner.name: learner.recipe.name for learner in run.learners}
    state["records"] = [{**r, "run": run.args.name, "recipe": names[r["arm"]]} for r in state["records"]]
    write(files.write_json, run.folder / "samples.json", [t for t in files.read_json(trunk / "samples.json") if t["when"] == "before"])
    return state


def what_next(args: argparse.Namespace, folder: Path) -> str:
    """The commands that read the records."""
    readers = ["crossover", "report"] if len(args.arms) > 1 else ["report"]
    return "next: " + ", then ".join(f"python -m nanochat_cl.{reader} {folder}" for reader in readers)


def evolve(args: argparse.Namespace) -> None:
    run = None
    with patching.applied(), runs.together(lambda: run.where() if run else "the start"):
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
                    run.saved(wait=False)
                    run.train()
                run.saved()
            except (KeyboardInterrupt, command.Terminated):
                run.save()
                run.saved()
                raise
            except Exception:
                if runs.ranks()[1] == 1:  # several ranks can't agree any more
                    run.saved()
                raise
    train_s, eval_s = (sum(getattr(learner, key) for learner in run.learners) for key in ("train_s", "eval_s"))
    update_s, load = sum(learner.update_s for learner in run.learners), run.load_of(run.state["records"][-1])
    spent = {"data": run.state["data_s"], "forward and backward": train_s - update_s, "optimizer": update_s, "evaluation": eval_s,
             "checkpoints": run.state["checkpoint_s"]}
    machine.say("evolve | time: " + ", ".join(f"{name} {s / sum(spent.values()):.0%}" for name, s in spent.items())
                + f"; ordinary milestones: evaluation {metrics.light_share(run.state['records']):.0%} of training (at most {MAX_EVAL_SHARE:.0%})"
                + f"; peak memory {load['peak_memory_bytes'] / 1e9:.1f} GB" + (f", MFU {load['mfu']:.0%}" if "mfu" in load else ""))
    for name in args.arms if args.floor_guard is not None else ():
        best = within(run.state["records"], name, args.floor_guard)
        machine.say(f"evolve | floor guard {args.floor_guard:g}: the best {name} within it is milestone {best['milestone']}, "
                    f"{short(best['tokens'])} tokens{' (Phase A itself)' * (not best['step'])}, domain {best['domain']['val']['bpb']:.3f} bpb; "
                    f"sample from it: python -m nanochat_cl.script scripts.base_eval --eval sample --model-tag {args.name}_{name}_kept")
    machine.say(f"evolve | {len(run.state['records'])} records in {run.folder / 'records.jsonl'}; {what_next(args, run.folder)}")
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
