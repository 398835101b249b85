"""
A sweep: arms x recipes x learning rates x seeds in Phase B, after the Phase A that they need. Run again it does what is missing.

python -m nanochat_cl.sweep --profile cpu --arms dense,cl --lrs 0.1,0.3,1,3 --seeds 42,43,44
python -m nanochat_cl.sweep --profile h100x8 --nproc 8 --dry-run      # the plan alone: tokens, FLOPs, memory, disk, hours

Flags that are not its own go to every evolve. Arms that share recipe and seed learn in lockstep in one run. Chosen is on val alone. An
optimum at the edge of its grid is none: the grid grows on that side, for all arms. A run that a guard stopped is a trial lost by the arm that
the guard names, and the others run again without it; any other failure stops the sweep. Writes <base>/evolve/<name>/: a folder per run, logs/
and sweep.json, the ledger of trials; then the certificate and the report over all runs, in the folder of the first.
"""
import argparse
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanochat_cl import accounting, arms, command, crossover, evolve, files, machine, pretrain, report, runs
from nanochat_cl.command import UserError
from nanochat_cl.profiles import PROFILES
from nanochat_cl.recipes import Recipe, of_arm, of_dense, read
from nanochat_cl.validity import trial

RECIPE = "lr_schedule=wsd,plasticity=budget:0.25"  # cooled down, and isolation is exercised; to a dense arm a budget of blocks is nothing
EXTENSIONS = 3      # of the grid, before an optimum at its edge is given up
STATE_BYTES = 12    # per parameter on disk: an fp32 weight and at most two moments; in memory a gradient more


@dataclass(frozen=True)
class Job:
    """One command: a Phase A of one arm (no recipe), or a Phase B of several in lockstep."""
    name: str
    folder: Path
    argv: tuple[str, ...]           # module and flags
    arms: tuple[str, ...]
    seed: int
    tokens: int                     # of each arm
    recipe: Recipe | None = None
    label: str = ""                 # of the recipe without its learning rate

    def scores(self) -> dict[str, float]:
        """Arm -> domain bpb on val at the end, for a Phase A nan; empty until the run is complete."""
        if self.recipe is None:
            return dict.fromkeys(self.arms, math.nan) if (self.folder / "phase_a.json").is_file() else {}
        records = files.read_jsonl(path) if (path := self.folder / "records.jsonl").is_file() else []
        ended = {r["arm"]: r["domain"]["val"]["bpb"] for r in records if r["final"]}
        return ended if set(ended) == set(self.arms) else {}

    def stopped_arm(self) -> str | None:
        """The arm for which a guard of evolve stopped the run: a trial that lost."""
        return files.read_json(path)["arm"] if self.recipe and (path := self.folder / "stopped.json").is_file() else None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    numbers = lambda kind: lambda text: [kind(x) for x in text.split(",")]
    p = argparse.ArgumentParser(prog="nanochat_cl.sweep", description="Phase B over a grid of learning rates and recipes; every other flag "
                                "goes to evolve", allow_abbrev=False)
    p.add_argument("--profile", choices=PROFILES, default="cpu", help="sizes of the runs (default: %(default)s)")
    p.add_argument("--name", default="sweep", help="of the folder in evolve/ (default: %(default)s)")
    p.add_argument("--arms", default="dense,cl", help="names of nanochat_cl.arms, dense controls among them (default: %(default)s)")
    p.add_argument("--lrs", type=numbers(float), default="0.1,0.3,1,3", help="factors on the learning rates (default: %(default)s)")
    p.add_argument("--seeds", type=numbers(int), default="42,43,44", help="default: %(default)s")
    p.add_argument("--recipes", nargs="+", default=[RECIPE], metavar="OPTION=VALUE,...",
                   help="by which options of evolve recipes differ, or default; the same for every arm (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=1, help="runs at once, each on a GPU or a part of the cores (default: %(default)s)")
    p.add_argument("--nproc", type=int, default=1, help="processes of each run, by torchrun (default: %(default)s)")
    p.add_argument("--explore", action="store_true", help="a study, no test: any arms and rates, the grid stays as it is, no certificate")
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    p.add_argument("--tok-per-s", type=float, help="training speed for the plan's hours (default: as earlier runs here measured it)")
    args, args.rest = p.parse_known_args(argv)
    args.arms, theirs = list(dict.fromkeys(args.arms.split(","))), evolve.parse(["--profile", args.profile, *args.rest])
    everywhere = {name: getattr(theirs.recipe, name) for name in ("total_batch_size", "max_seq_len")}
    recipes = [replace(r, **{name: getattr(r, name) or value for name, value in everywhere.items()}) for r in map(read, args.recipes)]
    args.seeds, args.recipes = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(recipe.name for recipe in recipes))
    args.batch_tokens, args.tag = theirs.batch_tokens, theirs.tag
    args.sizes, args.size = theirs.sizes, ["--profile", args.profile, *(["--depth", str(theirs.depth)] if theirs.depth else [])]
    usual = evolve.parse(["--profile", args.profile])
    if replace(theirs.recipe, **dict.fromkeys(everywhere, 0)) != usual.recipe or any(
            getattr(theirs, name) != getattr(usual, name) for name in ("seed", "name", "arms")):
        raise UserError("a sweep names its runs and recipes itself: expected --recipes OPTION=VALUE,..., --lrs, --seeds and --arms")
    tried = {(a.startswith("dense"), trial((a, of_arm(recipe, arms.named(a).recipe).name))) for a in args.arms for recipe in recipes}
    if not args.explore and 2 * (dense := sum(is_dense for is_dense, _ in tried)) < len(tried):
        raise UserError(f"the dense model gets at least as many trials as Model-CL: got {dense} different ones of {len(tried)} at each rate; "
                        f"add controls to --arms (dense-rows, dense-frozen), or say --explore")
    batches = {recipe.total_batch_size or theirs.batch_tokens for recipe in recipes}
    uneven = len(batches) > 1 and any(theirs.sizes[key] % batch for key in ("milestone_tokens", "max_tokens") for batch in batches)
    if not args.explore and (uneven or len({recipe.max_seq_len for recipe in recipes}) > 1):
        raise UserError("what is compared is scored after the same tokens, on documents cut alike: expected recipes of one max_seq_len, and "
                        "--milestone-tokens and --max-tokens that each total_batch_size divides; or say --explore")
    if min(args.lrs) <= 0 or len(set(args.lrs)) < (1 if args.explore else 2):
        raise UserError(f"expected positive --lrs, two at least without --explore, got {', '.join(f'{lr:g}' for lr in args.lrs)}")
    if min(args.jobs, args.nproc) < 1 or (args.jobs > 1 and args.nproc > 1):
        raise UserError(f"--jobs runs at once or --nproc processes of each: expected 1 or more, and one of them 1, got {args.jobs} and {args.nproc}")
    if any(read(label).lr_mult != 1 for label in args.recipes):
        raise UserError("learning rates are given by --lrs, not in --recipes")
    return args


def config(size: list[str], arm: str) -> dict[str, Any]:
    """The config that `arm` has, or will have; size: flags of pretrain."""
    dense = pretrain.model_config(pretrain.parse(size).flags, PROFILES[size[1]].vocab_size)
    return {**dense, "cl": arms.cl(dense["n_embd"], dense["n_head"], 0, arm)}


def phase_a(args: argparse.Namespace, base: Path) -> list[Job]:
    """Phase A of every seed, for the arms that do not begin from another's; none where --from names a checkpoint."""
    flags, jobs = pretrain.parse(args.size).flags, []
    tokens = math.prod(pretrain.horizon(flags, PROFILES[args.profile].vocab_size))
    for seed in args.seeds if args.tag is None else ():
        for a in dict.fromkeys(arms.named(a).phase_a or a for a in args.arms):
            argv, place = ("--arm", a, "--seed", str(seed)), base / "base_checkpoints" / f"d{flags['depth']}_{a}_s{seed}"
            jobs.append(Job(f"phase_a_{a}_s{seed}", place, ("nanochat_cl.pretrain", *args.size, *argv), (a,), seed, tokens))
    return jobs


def phase_b(args: argparse.Namespace, base: Path, grid: list[float]) -> list[Job]:
    """
    Phase B of every recipe and seed at every learning rate of the grid. Arms with a replay share of their own need a run of their own, and
    so do those whose run a guard has stopped because of another arm. Recipes that are one to an arm, which has its own, are run once.
    """
    jobs, planned = [], set()
    for label, seed, lr in itertools.product(args.recipes, args.seeds, grid):
        recipe, streams = replace(read(label), lr_mult=lr), {}
        batch = recipe.total_batch_size or args.batch_tokens
        for a in args.arms:
            own = of_arm(recipe, arms.named(a).recipe)
            once = a, of_dense(own) if a.startswith("dense") else own, seed
            if once not in planned:
                streams.setdefault(own.replay, []).append(a)
            planned.add(once)
        options = [f"--{f.name.replace('_', '-')}={value}" for f in fields(Recipe) if (value := getattr(recipe, f.name)) != f.default]
        for replay, mine in streams.items():
            prefix = "" if replay == recipe.replay else "+".join(mine) + "_"
            while mine:
                name = f"{prefix}{recipe.name}_s{seed}"
                argv = ("--profile", args.profile, "--arms", ",".join(mine), "--seed", str(seed), "--name", f"{args.name}/{name}", *options)
                job = Job(name, base / "evolve" / args.name / name, ("nanochat_cl.evolve", *args.rest, *argv), tuple(mine), seed,
                          args.sizes["max_tokens"] // batch * batch, recipe, label)
                lost = job.stopped_arm()
                jobs.append(replace(job, arms=(lost,)) if lost else job)
                mine = [a for a in mine if a != lost] if lost else []
                prefix = "+".join(mine) + "_"
    return jobs


def beyond(grid: list[float], best: float) -> float | None:
    """Where the best is the edge of its grid, the next learning rate on that side by the same factor; None where it is interior."""
    g = sorted(grid)
    ahead = {g[0]: g[0] ** 2 / g[1], g[-1]: g[-1] ** 2 / g[-2]}.get(best) if len(g) > 1 else None
    return ahead and float(f"{ahead:.3g}")


def optima(jobs: list[Job], scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """
    "dense" (all dense arms together) and every other arm -> the trial with the lowest mean over seeds. scores: job's name -> arm -> val
    bpb; what is not there did not end, and counts as infinite.
    """
    trials: dict[tuple, list[float]] = {}
    for job in jobs:
        for a in job.arms:
            trials.setdefault((a, job.label, job.recipe.lr_mult), []).append(scores.get(job.name, {}).get(a, math.inf))
    best: dict[str, dict] = {}
    for (a, label, lr), each in trials.items():
        found = {"val_bpb": sum(each) / len(each), "arm": a, "recipe": label, "lr_mult": lr}
        family = "dense" if a.startswith("dense") else a
        best[family] = min(best.get(family, found), found, key=lambda trial: trial["val_bpb"])
    return best


def plan(args: argparse.Namespace, base: Path, jobs: list[Job]) -> None:
    """Print what is to be done. Hours are those of training, memory is without activations, disk that of the states that are kept."""
    records = [r for path in (base / "evolve").rglob("records.jsonl") for r in files.read_jsonl(path)]
    speeds = {r["params_total"]: r["tok_per_s"] for r in records if r["tok_per_s"]}
    missing, hours, disk = [job for job in jobs if not job.scores() and not job.stopped_arm()], 0.0, 0.0
    for a in dict.fromkeys(a for job in jobs for a in job.arms):
        shape, mine = config(args.size, a), [job for job in missing if a in job.arms]
        flops, size, tokens = accounting.flops_per_token(shape), accounting.params(shape)["total"], sum(job.tokens for job in mine)
        speed = args.tok_per_s or speeds.get(size, math.nan)
        hours, disk = hours + tokens / speed / 3600, disk + STATE_BYTES * size * sum(runs.KEEP + 1 if job.recipe else 1 for job in mine)
        machine.say(f"sweep | {a}: {size / 1e6:,.2f}M parameters, {len(mine)} runs, {tokens / 1e6:,.1f}M tokens, {tokens * flops:.2e} "
                    f"FLOPs, {(STATE_BYTES + 4) * size / 2**30:.2f} GiB of memory and activations, "
                    + (f"{tokens / speed / 3600:.2f} h at {machine.short(speed)} tok/s" if speed > 0 else "hours unknown (--tok-per-s)"))
    known = f"about {hours / args.jobs:.2f} h and evaluation" if hours >= 0 else "time known after the first run"
    machine.say(f"sweep | {len(jobs)} runs, {len(missing)} to do, {args.jobs} at once, {disk / 2**30:.1f} GiB of disk, {known}")


def run_jobs(jobs: list[Job], width: int, start: Callable[[Job, int], Any], ended: Callable[[Job, int, str], None]) -> None:
    """
    Run jobs, `width` at once: start(job, slot) gives what has poll(), wait() and send_signal(), like a subprocess.Popen; ended(job, status,
    what is left) is called for each. When it raises, or on Ctrl-C and SIGTERM, all that run are told to save and stop, and waited for.
    """
    waiting, running, begun, done = list(jobs), {}, time.perf_counter(), 0
    size = lambda some: sum(job.tokens * len(job.arms) for job in some)
    try:
        while waiting or running:
            for slot in sorted(set(range(width)) - set(running))[:len(waiting)]:
                running[slot] = (job := waiting.pop(0)), start(job, slot)
            time.sleep(0.1)
            for slot, (job, process) in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[slot]
                    done += size([job])
                    left = (time.perf_counter() - begun) / done * (size(jobs) - done) / 60
                    ended(job, status, f"{len(waiting) + len(running)} runs, {left:.1f}m left")
    except BaseException as e:
        for _, process in running.values():
            process.send_signal(signal.SIGINT if isinstance(e, KeyboardInterrupt) else signal.SIGTERM)
        for _, process in running.values():
            process.wait()
        raise


def launch(args: argparse.Namespace, logs: Path) -> Callable[[Job, int], subprocess.Popen]:
    """What starts a job as a process that writes to logs/; of several at once each gets a GPU, or its part of the cores."""
    import torch
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    ranks = ["torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}", "-m"]
    logs.mkdir(parents=True, exist_ok=True)

    def start(job: Job, slot: int) -> subprocess.Popen:
        argv, apart = [*ranks, job.argv[0], "--", *job.argv[1:]] if args.nproc > 1 else job.argv, {}
        if args.jobs > 1:
            apart = {"CUDA_VISIBLE_DEVICES": gpus.split(",")[slot % (gpus.count(",") + 1)]} if gpus else {
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        with open(logs / f"{job.name}.log", "ab") as log:  # in a session of its own Ctrl-C reaches it once, from run_jobs
            return subprocess.Popen([sys.executable, "-m", *argv], env=os.environ | apart, stdout=log, stderr=log, start_new_session=True)
    return start


def sweep(args: argparse.Namespace, base: Path, start: Callable[[Job, int], Any] | None = None) -> dict:
    """Plan, run, extend, choose; the ledger is returned. It forgets no trial: rates and seeds that were tried belong to later calls as well."""
    folder, earlier = base / "evolve" / args.name, []
    asked = {"profile": args.profile, "arms": args.arms, "recipes": args.recipes, "evolve": args.rest, "nproc": args.nproc}
    if (folder / "sweep.json").is_file():
        before = files.read_json(folder / "sweep.json")
        runs.check_same(folder, before["asked"], asked, "only seeds and rates may change, or --name")
        earlier = [row for row in before["runs"] if row["status"] != "missing"]
    tried = [(row["seed"], row["lr_mult"]) for row in earlier]
    for path in sorted(folder.glob("*/config.json")):  # what ended after its sweep was killed is in no ledger
        begun = files.read_json(path)["asked"]
        job = Job(path.parent.name, path.parent, (), tuple(begun["arms"]), begun["seed"], 0, Recipe(**begun["recipe"]))
        if job.scores() or job.stopped_arm():
            tried.append((job.seed, job.recipe.lr_mult))
    args.seeds = list(dict.fromkeys([*args.seeds, *(seed for seed, _ in tried)]))
    grid = sorted({*args.lrs, *(lr for _, lr in tried)})
    plan(args, base, [*phase_a(args, base), *phase_b(args, base, grid)])
    if args.dry_run:
        return {}

    def ledger() -> dict:
        jobs = phase_b(args, base, grid)
        scores = {job.name: job.scores() for job in jobs}
        rows = [{"run": job.name, "arms": job.arms, "recipe": job.recipe.name, "label": job.label, "lr_mult": job.recipe.lr_mult,
                 "seed": job.seed, "tokens": job.tokens, "status": "complete" if scores[job.name] else "lost" if job.stopped_arm() else "missing",
                 "val_bpb": scores[job.name]} for job in jobs]
        rows += [row for row in earlier if row["run"] not in scores]
        trials = {a: sum(a in row["arms"] and row["status"] != "missing" for row in rows) for a in args.arms}
        made = {"asked": asked, "grid": grid, "trials": trials, "best": optima(jobs, scores), "runs": rows}
        files.write_json(folder / "sweep.json", made)
        return made

    def ended(job: Job, status: int, left: str) -> None:
        log = folder / "logs" / f"{job.name}.log"
        last = (log.read_text(errors="replace").strip().splitlines() if log.is_file() else [])[-1:]
        if not (scores := job.scores()) and not job.stopped_arm():
            raise UserError(f"{job.name} ended with status {status} {last}: see {log}; the same command continues")
        ledger()
        shown = ", ".join(f"{a} {bpb:.4f}" for a, bpb in scores.items()) if job.recipe and scores else "".join(last) or "complete"
        machine.say(f"sweep | {job.name}: {shown} | {left}")

    start = start or launch(args, folder / "logs")
    undone = lambda jobs: [job for job in jobs if not job.scores() and not job.stopped_arm()]
    for extension in range(EXTENSIONS + 1):
        run_jobs(undone(phase_a(args, base)), args.jobs, start, ended)
        while todo := undone(phase_b(args, base, grid)):  # again for the arms of a run that another arm stopped
            run_jobs(todo, args.jobs, start, ended)
        made = ledger()
        edge = {} if args.explore else {b["arm"]: ahead for b in made["best"].values() if (ahead := beyond(grid, b["lr_mult"]))}
        if not edge or extension == EXTENSIONS:
            break
        for a, ahead in edge.items():
            machine.say(f"sweep | the best learning rate of {a} is the edge of the grid: x{ahead:g} is added, for all arms and recipes")
        grid = sorted({*grid, *edge.values()})
    for family, b in made["best"].items():
        machine.say(f"sweep | best {family}: {b['arm']}, {b['recipe']}, learning rate x{b['lr_mult']:g}: {b['val_bpb']:.4f} bpb on val"
                    + f"; NO optimum, still the edge after {EXTENSIONS} extensions of the grid" * (b["arm"] in edge))
    machine.say(f"sweep | trials: {', '.join(f'{a} {n}' for a, n in made['trials'].items())} -> {folder / 'sweep.json'}")
    return made


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine.prepare()
    from nanochat.common import get_base_dir
    base = Path(get_base_dir())
    rows = sweep(args, base).get("runs", [])
    rows = sorted(rows, key=lambda row: row["status"])  # complete ones first: one gets the report
    pooled = [str(base / "evolve" / args.name / row["run"]) for row in rows]
    if pooled and not args.explore and (ours := [a for a in args.arms if not a.startswith("dense")]):
        for reader in (crossover, report):
            reader.main([*pooled, "--arm", ours[0]])


if __name__ == "__main__":
    command.run(main)
