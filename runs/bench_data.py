"""
How fast text becomes batches on this machine and what memory that takes; called by `bash runs/bench.sh data`.

Made-up text, from a seed, in a temporary base directory. A figure is the median over the rounds, in brackets the smallest and largest.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow.parquet as pq

import bench
from nanochat_cl import command, files, machine, stream, upstream
from nanochat_cl.holdout import NEAR, Overlap, digest
from nanochat_cl.sources import Document, write_parquet

BATCH, NEEDED = 65_536, 2_000_000  # tokens; tokens per second of eight ranks, each of which makes the whole batch and takes its rows
CONTEXTS, MARKS, STEPS, SUBDOMAINS = (512, 2048), (1, 10, 100), (10, 1_000_000), 8


def make_domain(base: Path) -> tuple[Path, list[str]]:
    """The text of the shards as a domain as well; its folder and its documents."""
    shards = sorted((base / "base_data_climbmix").glob("*.parquet"))
    texts = [text for path in shards for text in pq.read_table(path)["text"].to_pylist()]
    folder = base / "corpora" / "made-up"
    write_parquet(folder / "train.parquet", [Document(text, f"s{i % SUBDOMAINS}", digest(text)) for i, text in enumerate(texts)])
    files.write_json(folder / "corpus.json", {"order": "seed"})
    return folder, texts


def made(folder: Path, tokenizer, T: int, schedule: str = "cyclic", replay: float = 0.0) -> stream.Stream:
    return stream.Stream(folder, tokenizer, schedule, 0, BATCH // T, T, BATCH, repeat=True, replay=replay)


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """Seconds by the clock, seconds of the processor over all threads, and what `work` returns."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - processor, result


def spread(values: list[float], form: str = ",.1f") -> str:
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def tokenizing(folder: Path, texts: list[str], tokenizer, rounds: int) -> str:
    found, mb = [], sum(len(text.encode()) for text in texts) / 1e6
    for _ in range(rounds):
        shutil.rmtree(folder / "tokens", ignore_errors=True)
        found.append(timed(lambda: sum(map(len, stream.token_files([folder / "train.parquet"], folder, tokenizer).values()))))
    row = [f"{mb:,.1f} MB, {found[0][2]:,} tokens, V={tokenizer.get_vocab_size()}", spread([mb / clock for clock, _, _ in found]),
           spread([mb / cpu for _, cpu, _ in found]), spread([tokens / cpu for _, cpu, tokens in found], ",.0f")]
    return bench.table("text|MB/s|MB/s of one core|tok/s of one core", [row])


def batches(folder: Path, tokenizer, tokens: int, rounds: int) -> str:
    rows = []
    for T in CONTEXTS:
        for replay in (0.0, 0.25):
            s, steps = made(folder, tokenizer, T, replay=replay), range(1, 1 + max(1, tokens // BATCH))
            s.batch(0)  # token files and orders
            speeds = [len(steps) * BATCH / timed(lambda: [s.batch(step) and None for step in steps])[0] for _ in range(rounds)]
            rows.append([f"T={T}, {BATCH // T} rows, replay {replay:.0%}", spread(speeds, ",.0f"), f"{median(speeds) / NEEDED:.1f}"])
    return bench.table(f"Stream.batch()|tok/s of one process|over the {NEEDED:,} that 8 ranks need", rows)


def memory(folder: Path, base_tokens: int) -> list[list[str]]:
    """One row before the stream and one for each mark of MARKS, in units of `base_tokens`; to be called in a fresh process."""
    from nanochat.tokenizer import get_tokenizer

    def row(tokens: int) -> list[str]:
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return [f"{tokens:,}", *(f"{int(status[key].split()[0]) / 1024:,.1f}" for key in ("VmHWM", "RssAnon"))]

    s, step = made(folder, get_tokenizer(), CONTEXTS[-1]), 0
    rows = [row(0)]
    for mark in MARKS:
        while step * BATCH < mark * base_tokens:
            s.batch(step)
            step += 1
        rows.append(row(step * BATCH))
    return rows


def resume(folder: Path, tokenizer, rounds: int) -> str:
    rows = []
    for schedule in ("cyclic", "iid"):
        found = {step: [] for step in STEPS}
        for _ in range(5 * rounds):
            for step in STEPS:
                s = made(folder, tokenizer, CONTEXTS[-1], schedule, replay=0.25)
                found[step].append(1000 * timed(lambda: s.batch(step))[0])
        rows.append([schedule, *(spread(found[step], ".2f") for step in STEPS)])
    return bench.table("first batch of a fresh Stream|" + "|".join(f"batch({step:,}) ms" for step in STEPS), rows)


def screening(texts: list[str], rounds: int) -> str:
    mb, rows, shares = sum(len(text.encode()) for text in texts) / 1e6, [], {}
    for workers in (1, 2):
        overlap = Overlap({"held out": texts[::20]}, workers)
        overlap.of(texts[:128])  # starts the processes
        found = [timed(lambda: overlap.of(texts)) for _ in range(rounds)]
        shares[workers] = found[0][2]
        near, same = int((shares[workers] >= NEAR).sum()), np.array_equal(shares[workers], shares[1])
        rows.append([str(workers), spread([mb / clock for clock, _, _ in found]), f"{near:,} of {len(texts):,}", "yes" if same else "NO"])
    return bench.table("workers|MB/s|documents near a held-out one|same shares as one worker", rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash runs/bench.sh", description="Measure the data side on this machine")
    parser.add_argument("what", choices=["data"], help="see runs/bench.sh for the others")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=8192, help="of made-up text, 3 KB each (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32768, help="default: %(default)s")
    parser.add_argument("--tokens", type=float, default=1e6, help="memory is read after 1, 10 and 100 times as many (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=upstream.REPO / "runs" / "results", help="folder of the result")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.documents < 128:
        raise command.UserError(f"--rounds must be at least 1 and --documents 128, got {args.rounds} and {args.documents}")
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, about, begun = parse(argv), machine.describe(), time.time()
    with tempfile.TemporaryDirectory(prefix="bench_") as place:
        base = Path(place)
        os.environ["NANOCHAT_BASE_DIR"] = place
        machine.say(f"bench | text and a tokenizer of {args.vocab_size:,} in {base}")
        bench.make_text(base, args.vocab_size, args.documents)
        from nanochat.tokenizer import get_tokenizer
        (folder, texts), tokenizer, tables = make_domain(base), get_tokenizer(), []
        fresh = lambda work, *arguments: ProcessPoolExecutor(1, get_context("spawn")).submit(work, *arguments).result()
        for title, work in {
                "Tokenizing": lambda: tokenizing(folder, texts, tokenizer, args.rounds),
                "Batches": lambda: batches(folder, tokenizer, int(20 * args.tokens), args.rounds),
                "Memory": lambda: bench.table("tokens streamed|peak MiB|MiB without mapped files", fresh(memory, folder, int(args.tokens))),
                "Resume": lambda: resume(folder, tokenizer, args.rounds),
                "Near duplicates": lambda: screening(texts, args.rounds)}.items():
            machine.say(f"bench | {title.lower()}")
            tables.append(f"## {title}\n\n{work()}")
    bench.save(args, argv, about, begun, "the data", "\n\n".join(tables))


if __name__ == "__main__":
    command.run(main)
