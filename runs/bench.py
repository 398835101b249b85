"""
How fast the base and the blocks of Model-CL are on this machine; called by runs/bench.sh, which says how.

Every measurement of a model is a fresh process (this file, called with `worker`), and what is compared takes turns: A B A B. Text and
tokenizer are made up here, from a seed, in a temporary base directory. A figure is the median over the rounds. A ratio is that of the
medians; in brackets its smallest and largest value in a round.
"""
import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import bench_workers
from bench_workers import Case
from nanochat_cl import command, files, machine, upstream

NO_GPU = {"unmeasured": "this machine has no GPU; the same command measures it on one"}
NO_CPU = {"unmeasured": "a GPU was measured; with CUDA_VISIBLE_DEVICES= before the command it is the CPU"}
MLP_NOTE = """FLOPs over dense is the least that time over dense could be. `masked`, the reference, computes every block; `slice` has
one choice for all chunks; `auto` is the default. Of "routed 1/4 by itself" all blocks are routed and each chunk uses a quarter of them.
Chunks begin at 0, 16, 32, ... below C, as routing has them, but for the last line."""
MODEL_NOTE = """The FLOP ceiling is how many times as fast Model-CL would be if time followed FLOPs. At depth 4 heads of 128 are two,
and of so few none is routed; of heads of 64, three of four are."""
Results = dict[str, list[dict[str, Any]]]  # of each side, one per round


# --- calling them, in turns -------------------------------------------------------------------------------------------

def call(work: str, environment: dict[str, str], **arguments: Any) -> dict[str, Any]:
    """What `work` returns in a fresh process; {"unmeasured": why} when it fails there."""
    done = subprocess.run([sys.executable, __file__, "worker", json.dumps({"work": work, **arguments})], capture_output=True, text=True,
                          env={**os.environ, **{key: value for key, value in environment.items() if value}})
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    errors = re.findall(r"^[\w.]*(?:Error|Exception|Exit)\b.*", done.stderr, re.MULTILINE) or [f"exit status {done.returncode}"]
    return {"unmeasured": errors[-1], "out_of_memory": "OutOfMemory" in errors[-1]}


def alternate(case: Case, sides: dict[str, dict[str, str]], rounds: int, steps: int, base: Path) -> Results:
    """Measure each side ({"tree": ..., "arm": ...}) in turns. Where memory is short: half the rows, twice the micro-batches, for all."""
    results: Results = {label: [] for label in sides}
    for number in range(rounds):
        for label, side in sides.items():
            environment = {"NANOCHAT_BASE_DIR": str(base), "NANOCHAT_CL_UPSTREAM": side.get("tree", ""), "NANOCHAT_DTYPE": case.dtype}
            got = call("train_steps", environment, case=asdict(case), arm=side.get("arm", ""), steps=steps, started=time.time())
            said = got.get("unmeasured") or f"{got['tok_per_s']:,.0f} tok/s"
            machine.say(f"bench | {case.name} {label} | round {number + 1}/{rounds} | {said}")
            if got.get("out_of_memory") and case.rows > 1:
                return alternate(replace(case, rows=case.rows // 2, micro=case.micro * 2), sides, rounds, steps, base)
            if "unmeasured" in got:
                return {name: [got] for name in sides}
            results[label].append(got)
    return results


def make_text(base: Path, vocab_size: int, documents: int) -> None:
    """Shards of made-up words, as frequent as Zipf's law has it, and a tokenizer, laid out as nanochat expects them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    r = np.random.default_rng(0)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", *"lnrst")]
    lexicon = np.array(["".join(r.choice(syllables, r.integers(1, 5))) for _ in range(3 * vocab_size)])
    share = 1 / (np.arange(len(lexicon)) + 3)
    (folder := base / "base_data_climbmix").mkdir(parents=True)
    for i, lengths in enumerate(np.array_split(r.lognormal(5.5, 1.0, documents).astype(int) + 5, 3)):  # median 250 words
        texts = [" ".join(r.choice(lexicon, length, p=share / share.sum())) for length in lengths]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet", row_group_size=500)
    subprocess.run([sys.executable, "-m", "scripts.tok_train", f"--vocab-size={vocab_size}"], cwd=upstream.tree(), check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "NANOCHAT_BASE_DIR": str(base)})


# --- tables -----------------------------------------------------------------------------------------------------------

def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    each = [x / y for x, y in zip(a, b)]
    return f"{median(a) / median(b):.3f} ({min(each):.3f}-{max(each):.3f})"


def table(header: str, rows: list[list[str]]) -> str:
    """header: columns divided by |. A row that is shorter is filled up."""
    width = header.count("|") + 1
    return "\n".join(f"| {' | '.join([*row, *[''] * (width - len(row))])} |" for row in [header.split("|"), ["---"] * width, *rows])


def steps_table(measured: dict[str, Results]) -> str:
    rows = []
    for name, results in measured.items():
        for label, got in results.items():
            if "unmeasured" in got[0]:
                rows.append([name, label, f"UNMEASURED: {got[0]['unmeasured']}"])
                continue
            m, first, empty = lambda key: median(g[key] for g in got), got[0], sum(g["queue_empty"] or 0 for g in got)
            speeds = [g["tok_per_s"] for g in got]
            said = [name, *(first[key] for key in ("dtype", "pattern") if first[key] not in name), f"V={first['vocab_size']}"]
            rows.append([f"{', '.join(said)}, {first['micro']} x {first['rows']} x {first['seq_len']}", label,
                         f"{median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})",
                         *(f"{m(key):,.1f}" for key in ("step_ms", "forward_ms", "backward_ms", "optimizer_ms")),
                         f"{m('loader_ms'):.2f} ({m('loader_frac'):.2%})",
                         "-" if first["queue_empty"] is None else f"{empty} of {sum(g['batches'] for g in got)}",
                         *(f"{m(key):,.1f}" for key in ("memory_mib", "startup_s", "first_step_s")),
                         str(max(g["recompiles"] for g in got))])
    return table("model, dtype, windows, vocabulary, micro-batches x rows x T|side|tok/s (min-max)|step ms|forward|backward|optimizer|"
                 "loader ms/batch (of step)|queue empty when asked|peak MiB|start-up s|first step s|compiled after step 3", rows)


def pairs_table(measured: dict[str, Results], a: str, b: str) -> str:
    rows = []
    for name, got in measured.items():
        if "unmeasured" in got[a][0]:
            rows.append([name, f"UNMEASURED: {got[a][0]['unmeasured']}"])
            continue
        of = lambda side, key: [g[key] for g in got[side]]
        speed, ceiling = median(of(a, "tok_per_s")) / median(of(b, "tok_per_s")), of(b, "flops_per_token")[0] / of(a, "flops_per_token")[0]
        used = [g["flops_per_token"] * median(of(side, "tok_per_s")) / g["peak_flops"] if (g := got[side][0])["peak_flops"] else None
                for side in (a, b)]
        rows.append([name, ratio(of(a, "tok_per_s"), of(b, "tok_per_s")), f"{ceiling:.3f}", f"{speed / ceiling:.1%}",
                     ratio(of(a, "memory_mib"), of(b, "memory_mib")), "-" if None in used else f"{used[0]:.1%} / {used[1]:.1%}"])
    return table(f"model|tok/s, {a} / {b}|FLOP ceiling|of it reached|peak memory|active FLOPs over peak, {a} / {b}", rows)


def layers_table(measured: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, got in measured.items():
        if "unmeasured" in got:
            rows.append([name, f"UNMEASURED: {got['unmeasured']}"])
            continue
        for variant, v in got.items():
            dense, both = got["dense"], lambda v: [p + o for p, o in zip(v["pass_s"], v["optimizer_s"])]
            rows.append([name, variant, f"{1000 * median(v['pass_s']):.2f}", ratio(v["pass_s"], dense["pass_s"]), f"{v['flops']:.3f}",
                         f"{1000 * median(v['optimizer_s']):.2f}", ratio(both(v), both(dense))])
    return table("MLP|variant|forward + backward ms|time over dense|FLOPs over dense|optimizer ms|time over dense with optimizer", rows)


# --- what is measured -------------------------------------------------------------------------------------------------

def cpu_dtypes() -> tuple[str, ...]:
    """float32 is nanochat's choice on a CPU, bfloat16 that of the cpu profile where the processor has it."""
    return ("float32", "bfloat16") if machine.compute_dtype() else ("float32",)


def models(depths: Sequence[int], on_gpu: bool) -> list[Case]:
    """The models to measure: on a CPU tiny batches."""
    if on_gpu:
        return [Case(f"d{d}", d) for d in depths]
    return [Case(f"d{d} {dtype}", d, 4096, rows=8, seq_len=512, micro=1, dtype=dtype) for d in depths for dtype in cpu_dtypes()]


def bench_base(args: argparse.Namespace, base: Path, on_gpu: bool) -> str:
    sides = {"ours": {}, **({"against": {"tree": str(args.against)}} if args.against else {})}
    cases = models(args.depth or ((12, 20) if on_gpu else (4,)), on_gpu)
    measured = {case.name: alternate(case, sides, args.rounds, args.steps, base) for case in cases}
    absent = {"d4 on a CPU": {"": [NO_CPU]}} if on_gpu else {f"{d} on a GPU": {"": [NO_GPU]} for d in ("d12", "d20")}
    tables = [steps_table(measured | absent)]
    if args.against:
        hashes = {label: got[0].get("tree") for label, got in next(iter(measured.values())).items()}
        tables += [f"ours is the tree with hash {hashes['ours']}, against is {args.against.name}, {hashes['against']}.",
                   pairs_table(measured, "ours", "against")]
    return "\n\n".join(tables)


def bench_blocks(args: argparse.Namespace, base: Path, on_gpu: bool) -> str:
    shapes = [(1280, 32, 2048, "bfloat16")] if on_gpu else [(n, 1, 2048, dtype) for n in args.width for dtype in cpu_dtypes()[-1:]]
    layers = {}
    for n, rows, T, dtype in shapes:
        name = f"n={n}, {rows} x {T} tokens, {dtype}"
        machine.say(f"bench | MLP {name}")
        layers[name] = call("time_layers", {"NANOCHAT_DTYPE": dtype}, n=n, rows=rows, seq_len=T, rounds=args.rounds)
    kernels = (("SDPA, L", "sdpa", "L"), ("FA3, SSSL", "fa3", "SSSL")) if on_gpu else (("SSSL", "", "SSSL"),)
    cases = [replace(case, name=f"{case.name}, {how}", attention=attention, pattern=pattern)
             for case in models(args.depth or ((20,) if on_gpu else (4,)), on_gpu) for how, attention, pattern in kernels]
    if not on_gpu:
        cases.append(replace(cases[-1], name=f"{cases[-1].name}, heads of 64", head_dim=64))
    measured, flops = ({case.name: alternate(case, {"dense": {"arm": "dense"}, arm: {"arm": arm}}, args.rounds, args.steps, base)
                        for case in some} for arm, some in (("cl", cases), ("cl-flops", cases if on_gpu else [])))
    if on_gpu:
        layers["on a CPU"], measured["d4 on a CPU"] = NO_CPU, {"dense": [NO_CPU], "cl": [NO_CPU]}
    else:
        layers["n=1280, 32 x 2048 tokens, bfloat16, on a GPU"] = NO_GPU
        for found, arm in ((measured, "cl"), (flops, "cl-flops")):
            found |= {f"d20 on a GPU, {how}": {"dense": [NO_GPU], arm: [NO_GPU]} for how in ("SDPA, L", "FA3, SSSL")}
    return "\n\n".join(["## One MLP", MLP_NOTE, layers_table(layers), "## The whole model", MODEL_NOTE,
                        pairs_table(measured, "cl", "dense"), steps_table(measured), "## Matched by FLOPs, twice the width",
                        pairs_table(flops, "cl-flops", "dense"), steps_table(flops)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash runs/bench.sh", description="Measure speed and memory on this machine")
    parser.add_argument("what", choices=["base", "blocks"], help="the nanochat tree, or Model-CL beside dense")
    parser.add_argument("--against", type=Path, metavar="DIR", help="base: another nanochat tree to measure in alternation")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a measurement (default: %(default)s)")
    parser.add_argument("--depth", type=int, nargs="+", help="models (default: base: 4, on a GPU 12 and 20; blocks: 4, on a GPU 20)")
    parser.add_argument("--width", type=int, nargs="+", default=[384, 768], help="blocks: of the MLPs on a CPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=upstream.REPO / "runs" / "results", help="folder of the result")
    args = parser.parse_args(argv)
    if args.against and not (args.against / "nanochat" / "gpt.py").is_file():
        raise command.UserError(f"--against {args.against}: expected a nanochat checkout with nanochat/gpt.py, which is not there")
    if min(args.rounds, args.steps) < 1:
        raise command.UserError(f"--rounds and --steps must be at least 1, got {args.rounds} and {args.steps}")
    args.against = args.against and args.against.resolve()
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["worker"]:
        asked = json.loads(argv[1])
        if "case" in asked:
            asked["case"] = Case(**asked["case"])
        print(json.dumps(getattr(bench_workers, asked.pop("work"))(**asked)), flush=True)
        os._exit(0)  # a packing thread may be in the middle of a batch, and a process that ends under it aborts
    args, about, begun = parse(argv), machine.describe(), time.time()
    on_gpu = about["gpus"] > 0
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        vocab_size = 32768 if on_gpu else 4096
        machine.say(f"bench | text and a tokenizer of {vocab_size:,} in {folder}")
        make_text(Path(folder), vocab_size, documents=vocab_size // 4)
        tables = {"base": bench_base, "blocks": bench_blocks}[args.what](args, Path(folder), on_gpu)
    save(args, argv, about, begun, {"base": "the base", "blocks": "the blocks"}[args.what], tables)


def save(args: argparse.Namespace, argv: list[str], about: dict, begun: float, title: str, tables: str) -> None:
    """Write the result, with what it ran on, and print it."""
    place = re.sub(r"\W+", "-", about["device"].lower()).strip("-")
    said = " ".join(Path(a).name if "/" in a else shlex.quote(a) for a in argv)  # no paths of this machine
    text = (f"# Speed of {title} on {about['device']}\n\n    bash runs/bench.sh {said}\n\n"
            f"{datetime.date.today()}, {(time.time() - begun) / 60:.0f} minutes, {args.rounds} rounds. "
            f"{', '.join(f'{key} {value}' for key, value in about.items() if not isinstance(value, dict))}, "
            f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}"
            f"{', NOT COMPILED (TORCHDYNAMO_DISABLE)' if os.environ.get('TORCHDYNAMO_DISABLE') == '1' else ''}.\n"
            f"Medians over the rounds; a ratio is that of the medians, in brackets the smallest and largest in a round.\n\n{tables}\n")
    path = args.out / f"bench_{args.what}_{place}.md"
    files.write_text(path, text)
    print(f"{tables}\n\nbench | wrote {path}")


if __name__ == "__main__":
    command.run(main)
