"""
Phase B: the arms learn one stream of domain text in lockstep, batch by batch the same, and are scored at every milestone.

python -m nanochat_cl.evolve --profile cpu --arms dense,cl --seed 42
torchrun --standalone --nproc_per_node=8 -m nanochat_cl.evolve -- --profile h100x8 --arms dense,cl

Writes <base>/evolve/<run>/: config.json, records.jsonl (a line per arm and milestone), samples.json, checkpoints/. The same command
continues a run that was stopped, however it was, and ends with the same records.
"""
import argparse
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nanochat_cl import arms, command, corpus, crossover, domain, files, machine, patching, runs
from nanochat_cl.command import UserError
from nanochat_cl.profiles import PROFILES
from nanochat_cl.recipes import Recipe, multiplier, of_arm

if TYPE_CHECKING:
    from nanochat_cl.learner import PhaseA
    from nanochat_cl.phase_b import PhaseB

SIZES = {  # fields of a profile; a flag of that name wins
    "domain": (str, "as nanochat_cl.domain takes it"), "schedule": (str, "sequential, cyclic (rounds of visits), iid or drift"),
    "visit_tokens": (int, "cyclic: tokens of a visit to a sub-domain"), "milestone_tokens": (int, "trained tokens between two evaluations"),
    "max_tokens": (int, "trained tokens, 0: never stop"), "device_batch_size": (int, "rows per rank and micro-step"),
    "eval_docs": (int, "held-out documents of a sub-domain and split"), "probe_items": (int, "items of each probe")}
LINES = 64  # of progress


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nanochat_cl.evolve", description="Phase B: the arms on one stream of text", allow_abbrev=False)
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="sizes of the run (default: %(default)s)")
    parser.add_argument("--arms", default="dense,cl", help="names of nanochat_cl.arms, with commas (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the Phase A checkpoints and of the stream (default: %(default)s)")
    parser.add_argument("--name", help="of the run's folder (default: profile, domain, recipe and seed)")
    parser.add_argument("--depth", type=int, help="of the Phase A checkpoints (default: the profile's)")
    parser.add_argument("--from", dest="tag", help="for one arm: its folder in base_checkpoints (default: d<depth>_<arm>_s<seed>)")
    for name, (kind, help) in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{help} (default: the profile's)")
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
    if args.recipe.total_batch_size == (usual := PROFILES[args.profile].total_batch_size):
        args.recipe = replace(args.recipe, total_batch_size=0)  # as if it had not been named
    args.batch_tokens = args.recipe.total_batch_size or usual
    args.sizes = {name: getattr(PROFILES[args.profile], name) if getattr(args, name) is None else getattr(args, name) for name in SIZES}
    return args


@contextmanager
def signals(at_once: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """
    Ctrl-C and SIGTERM wait until the block calls what it gets, on all ranks: there the state is whole, and there they are raised. They are
    raised where they arrive while at_once() is true.
    """
    heard = [0]
    error = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: command.Terminated}

    def hear(number: int, frame: Any) -> None:
        heard.append(int(number))
        if at_once():
            raise error[number]

    def pause() -> None:
        if number := int(runs.over_ranks(torch.tensor(max(heard)), "max")):
            raise error[number]
    before = {number: signal.signal(number, hear) for number in error}
    try:
        yield pause
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check(args: argparse.Namespace) -> None:
    """UserError for flags that are wrong by themselves."""
    if len(set(args.arms)) < len(args.arms) or args.tag and len(args.arms) > 1:
        raise UserError(f"--arms names different arms, and one only with --from; got {', '.join(args.arms)}")
    if (args.floor_guard or 0) < 0:
        raise UserError(f"--floor-guard is how many bpb of general text may be lost, 0 or more, got {args.floor_guard}")
    if args.floor_guard is not None and args.branch_of:
        raise UserError("--floor-guard keeps the best model of a run from its start, and a branch starts midway: leave it out")
    if args.floor_guard is not None and args.recipe.max_seq_len:
        raise UserError("--floor-guard keeps a model for nanochat's scripts, which set attention windows by the context: leave out --max-seq-len")
    least = {"max_tokens": 0}  # never stop
    if bad := [f"{name} {value}" for name, value in args.sizes.items()
               if (value < least.get(name, 1) if isinstance(value, int) else not value)]:
        raise UserError(f"sizes must be positive, got {', '.join(bad)}")
    if 0 < args.sizes["max_tokens"] < args.batch_tokens:
        raise UserError(f"--max-tokens {args.sizes['max_tokens']:,} is less than one batch of {args.batch_tokens:,}")
    if not args.sizes["max_tokens"] and (args.recipe.lr_schedule != "constant" or not args.repeat):
        raise UserError("a run without end (--max-tokens 0) needs --repeat and --lr-schedule constant; cool down in a --branch-of it")
    if args.confirmatory and domain.name_of(args.sizes["domain"]) == (ours := PROFILES["cpu"].domain):
        raise UserError(f"--confirmatory is for a domain on which nothing was chosen, and on {ours} everything is: give another --domain")


def checkpoints(args: argparse.Namespace, vocab_size: int) -> list["PhaseA"]:
    """Phase A of every arm, with the context of Phase B; UserError where one is missing or they don't fit together."""
    from nanochat_cl import learner, pretrain
    depth, found = args.depth or pretrain.parse(["--profile", args.profile]).depth, []
    for name in args.arms:
        begun = arms.named(name).phase_a or name
        remedy = f"python -m nanochat_cl.pretrain --profile {args.profile} --arm {begun} --seed {args.seed}"
        found.append(learner.find(name, args.tag or f"d{depth}_{begun}_s{args.seed}", remedy + f" --depth {depth}" * bool(args.depth)))
    shapes = {a.arm: (a.config["sequence_len"], a.config["vocab_size"]) for a in found}
    seq_len = found[0].config["sequence_len"]
    if set(shapes.values()) != {(seq_len, vocab_size)}:
        raise UserError(f"the arms need one context length and the tokenizer's vocabulary of {vocab_size}, got {shapes}")
    return [replace(a, seq_len=args.recipe.max_seq_len or seq_len) for a in found]


def same_text(args: argparse.Namespace, found: list["PhaseA"], words: str, text: str | None) -> None:
    """UserError for a Phase A with another tokenizer than `words`; a warning where it read other text than the domain was compared with."""
    if other := [a.arm for a in found if a.result.get("asked", {}).get("tokenizer", words) != words]:
        raise UserError(f"Phase A of {', '.join(other)} was trained with another tokenizer than there is now; make it again")
    if other := [a.arm for a in found if a.result.get("text") != text]:
        what = (f"Phase A of {', '.join(other)} was not made with the general text that {domain.name_of(args.sizes['domain'])} was compared with: "
                f"it may have read what is held out")
        if args.confirmatory:
            raise UserError(f"{what}; for --confirmatory make it again, after the domain")
        machine.say(f"evolve | warning: {what}")


def begin(args: argparse.Namespace, held: ExitStack) -> "PhaseB | None":
    """All that can be refused is refused here, before anything is written; the folder is locked in `held`. None when the run is complete."""
    from nanochat import common, flash_attention

    from nanochat_cl import plasticity, tokenizer
    from nanochat_cl.exam import Exam
    from nanochat_cl.learner import Learner
    from nanochat_cl.phase_b import ENDLESS, PhaseB
    from nanochat_cl.stream import Stream
    check(args)
    try:
        *_, world_size, device = common.compute_init(args.device_type or common.autodetect_device_type())
    except AssertionError as e:
        raise UserError(f"no device {args.device_type} here ({e}); leave out --device-type to use what there is") from e
    if common.COMPUTE_DTYPE == torch.float16:
        raise UserError("in float16 small gradients vanish, and what has none counts as idle: set NANOCHAT_DTYPE to bfloat16 or float32")
    if device.type == "cuda" and not flash_attention.USE_FA3:
        machine.say("evolve | warning: no Flash Attention 3, so attention is PyTorch's: windows save it no time")
    vocabulary, token_bytes = tokenizer.load(args.profile)
    found = checkpoints(args, vocabulary.get_vocab_size())
    sizes, recipe, base, seq_len = args.sizes, args.recipe, Path(common.get_base_dir()), found[0].seq_len
    batch_tokens, rows, name = args.batch_tokens, sizes["device_batch_size"], domain.name_of(sizes["domain"])
    runs.check_batch(batch_tokens, rows * seq_len * world_size)
    if any(a.config.get("cl") for a in found):
        runs.check_ranks(world_size)
    own = {a: of_arm(recipe, arms.named(a).recipe) for a in args.arms}
    if lora := [a for a in args.arms if arms.named(a).lora and plasticity.parse(own[a].plasticity).shared]:
        raise UserError(f"{', '.join(lora)} has frozen all but its adapters, so plasticity {recipe.plasticity} is nothing to it: leave it out")
    if len(replays := {mine.replay for mine in own.values()}) > 1:
        raise UserError(f"arms of one run read one stream, and {', '.join(f'{a} replays {mine.replay:g}' for a, mine in own.items())}: "
                        f"give each share of replay a run of its own; crossover pools them")

    args.name = args.name or f"{args.profile}_{name}_{recipe.name}_s{args.seed}"
    folder, place, steps = base / "evolve" / args.name, base / "corpora" / name, sizes["max_tokens"] // batch_tokens or ENDLESS
    if recipe.warmup_steps >= steps:
        raise UserError(f"a warm-up of {recipe.warmup_steps} steps has no end in a run of {steps:,}: lower --warmup-steps, or raise --max-tokens")
    made = files.read_json(place / "corpus.json") if (place / "corpus.json").is_file() else {}
    words, text = tokenizer.fingerprint(token_bytes), corpus.fingerprint(made, "general_files")
    asked = {**{key: getattr(args, key) for key in ("profile", "arms", "seed", "repeat", "audit", "confirmatory", "floor_guard")}, **sizes,
             "recipe": vars(recipe), "batch_tokens": batch_tokens, "seq_len": seq_len, "ranks": world_size, "device": device.type,
             "dtype": str(common.COMPUTE_DTYPE), "fa3": flash_attention.USE_FA3, "tokenizer": words,
             "domain_text": corpus.fingerprint(made), "general_text": text,
             "phase_a": {a.arm: {"checkpoint": a.place.name, "step": a.step, "config": a.config} for a in found}}
    if (folder / "config.json").is_file():
        runs.check_same(folder, files.read_json(folder / "config.json")["asked"], asked, "give its flags, or another --name")
    records = files.read_jsonl(folder / "records.jsonl") if (folder / "records.jsonl").is_file() else []
    if sum(record["final"] for record in records) == len(found):
        say_end(args, folder, records, "complete: ")
        return None
    same_text(args, found, words, text)
    branchable = (sizes["max_tokens"] // sizes["milestone_tokens"]).bit_length() if args.keep_milestones else 0
    states = runs.KEEP + 1 + branchable - len(runs.saved_steps(folder))
    machine.check_disk(folder, 12 * states * sum(a.cost["params_total"] for a in found))  # fp32 weights and two moments, at most

    stream = Stream(place, vocabulary, sizes["schedule"], args.seed, batch_tokens // seq_len, seq_len, sizes["visit_tokens"],
                    args.repeat, replay=replays.pop(), max_tokens=steps * batch_tokens)
    exam = Exam(place, vocabulary, token_bytes, seq_len, rows, sizes["eval_docs"], sizes["probe_items"])
    learners = [Learner(a, own[a.arm], batch_tokens, device, args.seed, args.audit) for a in found]
    here = machine.describe()
    setting = {**{key: asked[key] for key in ("device", "dtype", "fa3", "tokenizer", "domain_text", "general_text")},
               "torch": here["torch"], "commit": here["commit"], "upstream": here["upstream"]["sha256"][:12]}
    run = PhaseB(args, folder, learners, stream, exam, steps, setting)
    state = runs.load_state(folder, device)
    if state is None and args.branch_of:
        state = branch(run, base / "evolve" / args.branch_of, asked, device)
    held.enter_context(runs.locked(folder, runs.ranks()[0]))
    if not (folder / "config.json").is_file():
        launched = ["torchrun", f"--nproc_per_node={world_size}", "-m"] if world_size > 1 else ["python", "-m"]
        runs.write(files.write_json, folder / "config.json", {
            "run": args.name, "argv": [*launched, "nanochat_cl.evolve", *args.argv], "profile": args.profile, "asked": asked,
            "steps": steps, "machine": here, "wandb_id": secrets.token_hex(8),
            "arms": {a.arm: {**a.cost, "cl": a.config.get("cl"), "phase_a": a.result} for a in found}})
    if runs.ranks()[0] == 0:
        (folder / "stopped.json").unlink(missing_ok=True)  # of an earlier try
    if state:
        run.load(state)
        runs.write(files.write_jsonl, folder / "records.jsonl", run.state["records"])
    if args.run != "dummy" and runs.ranks()[0] == 0:
        import wandb
        begun = files.read_json(folder / "config.json").get("wandb_id")  # a continued run continues its curve
        run.log = wandb.init(project="nanochat_cl", name=args.run, id=begun, resume="allow", dir=str(folder), config=asked)
    length = "without end, steps" if steps == ENDLESS else f"{run.marks.last + 1:,} milestones, {steps:,} steps"
    machine.say(f"evolve | {', '.join(args.arms)} s{args.seed}, recipe {recipe.name}: {length} of {machine.short(batch_tokens)} tokens of "
                f"{name} ({sizes['schedule']}), from "
                f"{'step ' + str(run.state['step']) if state else 'Phase A'} -> {folder}")
    return run


def branch(run: "PhaseB", trunk: Path, asked: dict, device: torch.device) -> dict:
    """
    The trunk's last state up to which `run`, at Phase A still, does what the trunk did: then it ends as if it had run from the start. Recall
    of the records until then is of the trunk's passages.
    """
    from nanochat_cl import recall
    from nanochat_cl.phase_b import Milestones
    if not (trunk / "config.json").is_file():
        raise UserError(f"--branch-of names a run, and there is none at {trunk}")
    config, free = files.read_json(trunk / "config.json"), {"lr_schedule": None, "cooldown_frac": None}
    without = lambda asked: {**asked, "max_tokens": None, "floor_guard": None, "recipe": asked["recipe"] | free}
    runs.check_same(trunk, without(config["asked"]), without(asked), "a branch differs in --lr-schedule, --cooldown-frac and --max-tokens")
    recipe, theirs, both = run.args.recipe, Recipe(**config["asked"]["recipe"]), min(run.steps, config["steps"])
    agree = next((s for s in range(both) if multiplier(s, run.steps, recipe) != multiplier(s, config["steps"], theirs)), both)
    marks = Milestones(config["steps"], run.batch_tokens, config["asked"]["milestone_tokens"])
    ends_with_a_score = marks.number(run.steps) is not None
    state = runs.load_state(trunk, device, lambda step: ends_with_a_score and step <= agree and step < run.steps)
    if state is None:
        raise UserError(f"{trunk} holds no state to branch from: its states are at steps {runs.saved_steps(trunk)}, the rates agree up to step "
                        f"{agree}, and the end, step {run.steps}, must be one of its milestones")
    for learner in run.learners:  # the passages asked for depend on the end
        state["arms"][learner.name]["before"] = recall.nats_and_bytes(learner.model, run.passages, run.exam.token_bytes).tolist()
    names = {learner.name: learner.recipe.name for learner in run.learners}
    state["records"] = [{**r, "run": run.args.name, "recipe": names[r["arm"]]} for r in state["records"]]
    runs.write(files.write_json, run.folder / "samples.json", [t for t in files.read_json(trunk / "samples.json") if t["when"] == "before"])
    return state


def h1(records: list[dict]) -> str:
    """The H1 check on both Phase A checkpoints: is Model-Dense the better one before Phase B?"""
    found = crossover.assess(records)
    gap, general = found["parts"]["gap"], found["general_start"]
    return (f"evolve | H1 check, cl - dense (score = -bpb, 95 % over {found['over']}): domain {crossover.interval(gap)}, "
            f"general {crossover.interval(general)}: {dict(fail='fails: cl starts level or above', open='open').get(gap['state'], 'holds')}")


def what_next(args: argparse.Namespace, folder: Path) -> str:
    """The commands that read the records."""
    ours = [arm for arm in args.arms if not arm.startswith("dense")]
    other = f" --arm {ours[0]}" if ours and "cl" not in ours else ""
    readers = ["crossover", "report"] if 0 < len(ours) < len(args.arms) else ["report"]
    return "next: " + ", then ".join(f"python -m nanochat_cl.{reader} {folder}{other}" for reader in readers)


def say_end(args: argparse.Namespace, folder: Path, records: list[dict], how: str = "") -> None:
    """The last lines of a run, and all of one that was complete."""
    from nanochat_cl.phase_b import kept
    for line in kept(args, records):
        machine.say(line)
    machine.say(f"evolve | {how}{len(records)} records in {folder / 'records.jsonl'}; {what_next(args, folder)}")


def evolve(args: argparse.Namespace) -> None:
    run = None
    with patching.applied(), runs.together(lambda: run.where() if run else "the start"), ExitStack() as held:
        run = begin(args, held)
        if run is None:
            return
        with signals(run.compiling) as pause:
            try:
                while True:
                    step = run.state["step"]
                    if run.marks.number(step) is not None and not any(record["step"] == step for record in run.state["records"]):
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
                if not run.compiling():
                    run.save()
                run.saved()
                raise
            except Exception:
                if runs.ranks()[1] == 1:  # several ranks can't agree any more
                    run.saved()
                raise
    machine.say(run.shares())
    say_end(args, run.folder, run.state["records"])
    if run.log:
        run.log.finish()
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine.prepare(args.device_type)
    evolve(args)


if __name__ == "__main__":
    command.run(main)
