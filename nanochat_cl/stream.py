"""
The stream of Phase B: a domain's training documents as batches of rows, the same for every arm with the same seed.

1. Documents are tokenized once, BOS first, and joined per sub-domain into memory-mapped files, kept by tokenizer and corpus hash.
2. A row is BOS and the next T tokens of its sub-domain; inputs = row[:-1], targets = row[1:], so that each token is a target once an epoch.
3. A schedule orders all rows of an epoch; batch(step) takes the next ones: a pure function of the step, so resume costs nothing.

python -m nanochat_cl.stream describe python --profile cpu
"""
# B rows, T positions, R rows of an epoch
import argparse
import fcntl
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from nanochat_cl import command, files
from nanochat_cl.holdout import digest
from nanochat_cl.profiles import PROFILES
from nanochat_cl.seeds import seed_for

SCHEDULES = ("sequential", "cyclic", "iid", "drift")
GENERAL = "general"  # label of replayed rows


@dataclass(frozen=True)
class Batch:
    inputs: torch.Tensor   # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    subdomains: list[str]  # one per row; "general" for replay


def token_files(sources: list[Path], folder: Path, tokenizer, label: str | None = None) -> dict[str, np.ndarray]:
    """
    {sub-domain: tokens}, memory-mapped from `folder`/tokens/<tokenizer hash>; made first where they are missing or where `sources`
    (parquet files with columns text and subdomain; `label` stands for the latter) have changed since. Ranks wait for one another.
    """
    state = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    vocabulary = [tokenizer.get_bos_token_id(), *map(tokenizer.decode_single_token_bytes, range(tokenizer.get_vocab_size()))]
    place = folder / "tokens" / digest(repr(vocabulary))
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        index = files.read_json(place / "index.json") if (place / "index.json").is_file() else {}
        if index.get("sources") != state:
            index = {"sources": state, **_tokenize(sources, place, tokenizer, label)}
            files.write_json(place / "index.json", index)
    return {name: np.memmap(place / f"{i:03d}.bin", dtype=index["dtype"], mode="r") for i, name in enumerate(index["subdomains"])}


def _tokenize(sources: list[Path], place: Path, tokenizer, label: str | None) -> dict:
    dtype = np.dtype("uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32")
    out = {}
    with ExitStack() as stack:
        for path in sources:
            for batch in pq.ParquetFile(path).iter_batches(512, columns=["text"] if label else ["text", "subdomain"]):
                rows = batch.to_pylist()
                for row, tokens in zip(rows, tokenizer.encode([row["text"] for row in rows], prepend=tokenizer.get_bos_token_id())):
                    name = row.get("subdomain", label)
                    if name not in out:
                        out[name] = stack.enter_context(files.replacing(place / f"{len(out):03d}.bin"))
                    out[name].write(np.array(tokens, dtype).tobytes())
    return {"dtype": dtype.name, "subdomains": list(out)}


class Stream:
    """
    Batches of `rows` rows, over all ranks, of one domain. `visit_tokens` (cyclic only) is snapped to whole batches. `replay` is the share of
    rows that repeat general training text, exact in the long run. Sub-domains come in the order that the domain's manifest names: name, size
    (largest first), given or time (as in train.parquet) or seed; the documents of one keep their order. Raises UserError for what does not
    fit, and when `max_tokens` are asked of a stream that holds fewer without `repeat`. The last tokens of a sub-domain that fill no
    row (fewer than T) are not used.
    """

    def __init__(self, domain_dir: str | Path, tokenizer, schedule: str, seed: int, rows: int, seq_len: int, visit_tokens: int,
                 repeat: bool = False, replay: float = 0.0, max_tokens: int = 0):
        train, made = Path(domain_dir) / "train.parquet", Path(domain_dir) / "corpus.json"
        if schedule not in SCHEDULES:
            raise command.UserError(f"--schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if not train.is_file():
            raise command.UserError(f"no domain at {domain_dir}: train.parquet expected; make it with: python -m nanochat_cl.domain")
        self.schedule, self.repeat, self.seq_len, self.rows, self.replay = schedule, repeat, seq_len, rows, replay
        self.bos, self._tokens = tokenizer.get_bos_token_id(), token_files([train], train.parent, tokenizer)
        self._shuffled = lru_cache(3)(lambda purpose, n: np.random.default_rng(seed_for(seed, purpose)).permutation(n))
        self._order = lru_cache(3)(self._order)  # of the epochs in use, and of the first for seen()
        names, order = sorted(self._tokens), files.read_json(made)["order"] if made.is_file() else "seed"
        orders = {"name": names, "size": sorted(names, key=lambda name: -len(self._tokens[name])),
                  "given": list(self._tokens), "time": list(self._tokens),
                  "seed": [names[i] for i in self._shuffled("subdomains", len(names))]}
        if order not in orders:
            raise command.UserError(f"the order of sub-domains must be {', '.join(orders)}, got {order!r}")
        self.subdomains = orders[order]
        if replay:
            if GENERAL in names:
                raise command.UserError(f"--replay and a sub-domain called {GENERAL} cannot be told apart; "
                                        f"rename it and make the domain again")
            from nanochat import dataset
            shards = sorted(Path(dataset.DATA_DIR).glob("*.parquet"))[:-1]  # by name, whatever order a run's seed gives them
            self._tokens |= token_files(shards, train.parents[1] / GENERAL, tokenizer, GENERAL) or {GENERAL: np.empty(0)}
        if short := [f"{name} ({len(tokens):,})" for name, tokens in self._tokens.items() if len(tokens) < seq_len]:
            raise command.UserError(f"fewer tokens than one row of {seq_len:,} in {', '.join(short)}; add documents")
        self._counts = np.array([len(self._tokens[name]) // seq_len for name in self.subdomains])  # rows
        self.total_tokens = seq_len * int(self._counts.sum())  # of an epoch
        self._visit = max(1, round(visit_tokens / (seq_len * rows))) * max(1, round(rows * (1 - replay)))
        batches = bisect_right(range(2**40), self._counts.sum(), key=self._domain_rows) - 1  # the most that need no more rows than there are
        have = batches * rows * seq_len
        if max_tokens > have and not repeat:
            raise command.UserError(f"the stream holds {have:,} tokens but --max-tokens asks for {max_tokens:,}; "
                                    f"add documents or pass --repeat")

    def _order(self, epoch: int) -> np.ndarray:
        """All rows of an epoch in order: (R, 2) of sub-domain number and row number in it."""
        number = np.repeat(np.arange(len(self._counts)), self._counts)
        row = np.concatenate([np.arange(n) for n in self._counts])
        order = np.arange(len(row))  # sequential
        if self.schedule == "cyclic":  # rounds of visits
            order = np.lexsort((row, number, row // self._visit))
        elif self.schedule == "iid":
            order = self._shuffled(f"rows of epoch {epoch}", len(row))
        elif self.schedule == "drift":  # sub-domain j is densest around j and fades in and out over its neighbours' time
            quantile = (row + 0.5) / self._counts[number]
            triangle = np.where(quantile < 0.5, np.sqrt(2 * quantile) - 1, 1 - np.sqrt(2 * (1 - quantile)))
            order = np.argsort(number + triangle, kind="stable")
        return np.stack([number[order], row[order]], axis=1)

    def _domain_rows(self, step: int) -> int:
        """Rows of domain text in the first `step` batches."""
        return step * self.rows - int(step * self.rows * self.replay + 1e-6)

    def _place(self, row: int) -> tuple[str, int]:
        """Sub-domain and first token of a domain row, counted over all epochs."""
        epoch, r = divmod(row, self.total_tokens // self.seq_len)
        if epoch and not self.repeat:
            raise command.UserError(f"the stream holds {self.total_tokens:,} tokens and has ended; add documents or pass --repeat")
        j, i = self._order(epoch)[r]
        return self.subdomains[j], int(i) * self.seq_len

    def places(self, step: int) -> list[tuple[str, int]]:
        """Sub-domain and first token of every row of a batch, replay last."""
        first, last = self._domain_rows(step), self._domain_rows(step + 1)
        places = [self._place(row) for row in range(first, last)]
        for row in range(step * self.rows - first, (step + 1) * self.rows - last):  # of general text, which each pass shuffles anew
            n = len(self._tokens[GENERAL]) // self.seq_len
            places.append((GENERAL, int(self._shuffled(f"replay, pass {row // n}", n)[row % n]) * self.seq_len))
        return places

    def batch(self, step: int) -> Batch:
        """Batch `step` (from 0): the same whatever was asked before."""
        places = self.places(step)
        rows = np.full((self.rows, self.seq_len + 1), self.bos, np.int64)
        for row, (name, offset) in zip(rows, places):
            row[1:] = self._tokens[name][offset:offset + self.seq_len]
        rows = torch.from_numpy(rows)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), [name for name, _ in places])

    def current(self, step: int) -> str:
        """The sub-domain that most domain rows of batch `step` come from; on a tie the one it visits later, without any the one before."""
        first, last = self._domain_rows(step), self._domain_rows(step + 1)
        names = [self._place(row)[0] for row in range(first, last) or [max(0, last - 1)]]
        return max(reversed(names), key=names.count)

    def seen(self, step: int) -> list[str]:
        """The sub-domains that the first `step` batches drew from, in the order they came."""
        return [self.subdomains[j] for j in dict.fromkeys(self._order(0)[:self._domain_rows(step), 0].tolist())]

    def unique_tokens(self, step: int) -> int:
        """Distinct domain tokens among the targets of the first `step` batches."""
        return min(self._domain_rows(step) * self.seq_len, self.total_tokens)

    def epoch(self, step: int) -> float:
        """Passes over the domain's training tokens after `step` batches."""
        return self._domain_rows(step) * self.seq_len / self.total_tokens


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nanochat_cl.stream", description="Tokenize a domain, print what its stream holds and draw it")
    parser.add_argument("command", choices=["describe"])
    parser.add_argument("domain", nargs="?", help="as nanochat_cl.domain takes it (default: the profile's)")
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="sizes of the run (default: %(default)s)")
    parser.add_argument("--schedule", choices=SCHEDULES, help="default: the profile's")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    return parser.parse_args(argv)


def describe(args: argparse.Namespace) -> None:
    """Table on the screen; sizes, overlap and schedule as describe.png beside the domain."""
    from nanochat.common import get_base_dir

    from nanochat_cl import domain, pretrain, tokenizer
    profile, base = PROFILES[args.profile], Path(get_base_dir())
    folder = base / "corpora" / domain.name_of(args.domain or profile.domain)
    seq_len = pretrain.parse(["--profile", args.profile]).flags["max_seq_len"]
    stream = Stream(folder, tokenizer.load(args.profile)[0], args.schedule or profile.schedule, args.seed,
                    profile.total_batch_size // seq_len, seq_len, profile.visit_tokens, repeat=True)
    found = files.read_json(folder / "corpus.json")["subdomains"]
    rows = {name: {**found[name], "tokens": len(stream._tokens[name])} for name in stream.subdomains}
    print(domain.table(rows))

    from matplotlib.figure import Figure
    figure = Figure((14, 1.5 + 0.3 * len(rows)), layout="constrained")
    sizes, overlap, schedule = figure.subplots(1, 3, sharey=True, width_ratios=[1, 1, 3])
    for axes, column, scale, label in ((sizes, "tokens", 1e-6, "tokens (M)"), (overlap, "mean_share", 100, "% held-out 13-grams")):
        axes.barh(list(rows), [scale * row[column] for row in rows.values()])
        axes.set_xlabel(label)
    steps = np.linspace(0, profile.max_tokens // profile.total_batch_size, 300, endpoint=False).astype(int)
    drawn = [[name for name, _ in stream.places(step)] for step in steps]
    schedule.imshow([[names.count(name) for names in drawn] for name in rows], aspect="auto", cmap="Blues", interpolation="nearest",
                    extent=(0, profile.max_tokens / 1e6, len(rows) - 0.5, -0.5))
    schedule.set_xlabel(f"{stream.schedule}: rows of the batch, over trained tokens (M)")
    with files.replacing(folder / "describe.png") as f:
        figure.savefig(f, format="png", dpi=120)
    print(f"stream | {stream.schedule}: {stream.total_tokens:,} tokens an epoch, --max-tokens {profile.max_tokens:,} are "
          f"{profile.max_tokens / stream.total_tokens:.2f} epochs; drawn in {folder / 'describe.png'}")


def main(argv: list[str] | None = None) -> None:
    describe(parse(argv))


if __name__ == "__main__":
    command.run(main)
