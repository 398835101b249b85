"""
The records of Phase B runs as arrays that can be compared: paired by seed, data order and evaluation document.

score = -(domain bpb), the mean over sub-domains; a run is an arm with a recipe.
"""
# R runs, S seeds, M milestones, B resamples, D documents
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanochat_cl import files
from nanochat_cl.arms import ARMS
from nanochat_cl.command import UserError


def stopped_trials(run_dirs: list[str | Path]) -> list[dict]:
    """
    The trials among several runs that a guard stopped: arm, recipe, lr_mult, seed, step and reason of each, and under "ended" the last
    domain bpb on val by seed where it did not. One run is no trial.
    """
    found = [files.read_json(path) for d in run_dirs if (path := Path(d) / "stopped.json").is_file() and len(run_dirs) > 1]
    written = [path for d in run_dirs if (path := Path(d) / "records.jsonl").is_file()] if found else []
    ends = [r for path in written for r in files.read_jsonl(path) if r.get("final")]
    return [{**trial, "ended": {r["seed"]: r["domain"]["val"]["bpb"] for r in ends
                                if (r["arm"], r["recipe"]) == (trial["arm"], trial["recipe"])}} for trial in found]


def load(run_dirs: list[str | Path]) -> list[dict]:
    """
    All records of the runs, but for `stopped_trials`: recipes that an arm has lost on one of the seeds. UserError names the file and line
    of what cannot be read.
    """
    records: dict[tuple, dict] = {}
    gone = {(trial["arm"], trial["recipe"]) for trial in stopped_trials(run_dirs)}
    for path in (Path(d) / "records.jsonl" for d in run_dirs if len(run_dirs) == 1 or not (Path(d) / "stopped.json").is_file()):
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"{path} holds no record: expected a Phase B run; run nanochat_cl.evolve to its first milestone")
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                r = json.loads(line)
                _ = r["tokens"], r["stream_hash"], r["domain"]["test"]["subdomains"], r["domain"]["val"]["bpb"], r["general"]["test"]
                key = r["arm"], r["recipe"], r["seed"], r["milestone"]
            except (ValueError, KeyError, TypeError) as e:
                what = f"has no field {e}" if isinstance(e, KeyError) else "is not a whole record"
                raise UserError(f"{path} line {number} {what}: the file was cut or edited; run the same evolve command again") from None
            if key in records:
                raise UserError(f"{key[0]}/{key[1]} seed {key[2]} is in two of the runs; name each run once")
            if key[:2] not in gone:
                records[key] = r
    return list(records.values())


def documents(r: dict, part: str, split: str = "test") -> np.ndarray:
    """(D, 3) nats, bytes and number of the sub-domain of a record's held-out documents; part is "domain" or "general"."""
    found = r[part][split]
    panels = [panel for _, panel in sorted(found["subdomains"].items())] if part == "domain" else [found]
    return np.array([(nats, size, j) for j, panel in enumerate(panels) for nats, size in panel["docs"]], float)


def scores(nats: np.ndarray, size: np.ndarray, owner: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """-bpb, mean over sub-domains: nats (..., D), bytes (D,), sub-domain of each (D,) -> (...), with weights (B, D) -> (B, ...)."""
    w = np.ones(len(size)) if weights is None else weights
    total, subdomains = 0.0, np.unique(owner)
    for mine in (owner == j for j in subdomains):
        spent = np.tensordot(w[..., mine], nats[..., mine], axes=(-1, -1))      # ([B,] ...)
        total = total - (spent.T / (np.log(2) * w[..., mine] @ size[mine])).T / len(subdomains)
    return total


def forgotten(scores: np.ndarray) -> np.ndarray:
    """What scores (..., M) have lost since the first milestone."""
    return scores[..., :1] - scores


def labels(runs: list[tuple[str, str]]) -> list[str]:
    """
    Short names for pictures: the arm, and what of its recipe neither the arm's name says nor all others have. Of dense and dense-replay-5
    at two rates each, all cooled down: dense/lr_mult=0.3, dense, dense-replay-5/lr_mult=0.3, dense-replay-5.
    """
    option = lambda part: part.partition("=")[0]
    own = [{*ARMS[arm].recipe} - {"lr_mult"} if arm in ARMS else set() for arm, _ in runs]
    parts = [[part for part in recipe.split(",") if option(part) not in mine] for (_, recipe), mine in zip(runs, own)]
    shared = {part for mine in parts for part in mine if all(part in other or option(part) in theirs for other, theirs in zip(parts, own))}
    distinct = [",".join(part for part in mine if part not in shared) for mine in parts]
    return [f"{arm}/{what}" if what else arm for (arm, _), what in zip(runs, distinct)]


@dataclass(frozen=True)
class Curves:
    """Records as arrays over runs = [(arm, recipe)] (R), dense ones first, seeds (S) and milestones (M)."""
    runs: list[tuple[str, str]]
    seeds: list[int]
    at: dict[tuple, list[dict]]         # (arm, recipe, seed) -> its records by milestone

    names = property(lambda self: ["/".join(name) for name in self.runs])
    labels = cached_property(lambda self: labels(self.runs))                                        # names without what all have in common
    first = property(lambda self: self.at[(*self.runs[0], self.seeds[0])])                          # the records of one run
    tokens = property(lambda self: np.array([r["tokens"] for r in self.first]))                     # (M,)
    val = cached_property(lambda self: self.stack(lambda r: -r["domain"]["val"]["bpb"]))            # scores (R, S, M)
    test = cached_property(lambda self: scores(*self.panel("domain")))
    general = cached_property(lambda self: scores(*self.panel("general")))
    general_val = cached_property(lambda self: self.stack(lambda r: -r["general"]["val"]["bpb"]))

    def stack(self, value: Callable) -> np.ndarray:
        """value(record) of every record -> (R, S, M, ...), nan for None."""
        return np.array([[[value(r) for r in self.at[(*name, s)]] for s in self.seeds] for name in self.runs], float)

    def field(self, key: str) -> np.ndarray:
        return self.stack(lambda r: r.get(key))

    def panel(self, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nats (R, S, M, D), bytes (D,) and sub-domain (D,) of the test documents."""
        return self.stack(lambda r: documents(r, part)[:, 0]), *documents(self.first[0], part)[:, 1:].T


def paired(records: list[dict]) -> Curves:
    """Arrays of the records; UserError where runs differ in milestones, stream or documents. Streams differ by intent where replay or batch do."""
    names = sorted({(r["arm"], r["recipe"]) for r in records}, key=lambda name: (not name[0].startswith("dense"), name))
    at: dict[tuple, list[dict]] = {}
    for r in sorted(records, key=lambda r: r["milestone"]):
        at.setdefault((r["arm"], r["recipe"], r["seed"]), []).append(r)
    seeds = sorted({key[2] for key in at})
    if missing := [f"{'/'.join(name)} seed {s}" for name in names for s in seeds if (*name, s) not in at]:
        raise UserError(f"arms are paired by seed, and {', '.join(missing[:4])} is missing beside the others: run it, or leave that arm and "
                        f"recipe, or that seed, out")
    c, streams = Curves(names, seeds, at), {}
    for name in names:
        for s in seeds:
            mine, who = at[(*name, s)], f"{'/'.join(name)} seed {s}"
            if [(r["milestone"], r["tokens"]) for r in mine] != [(r["milestone"], r["tokens"]) for r in c.first]:
                raise UserError(f"{who} has {len(mine)} milestones to {mine[-1]['tokens']:,} tokens, {c.names[0]} has {len(c.first)} "
                                f"to {c.tokens[-1]:,}: milestones must agree; finish the run, or give both one --milestone-tokens")
            if mine[0].get("schedule") != c.first[0].get("schedule"):
                raise UserError(f"{who} ran on schedule {mine[0].get('schedule')}, {c.names[0]} on {c.first[0].get('schedule')}: not comparable")
            if diverged := [r["milestone"] for r in mine if not np.isfinite(
                    [r["domain"]["val"]["bpb"], *documents(r, "domain")[:, 0], *documents(r, "general")[:, 0]]).all()]:
                raise UserError(f"{who} has scores that are not finite from milestone {diverged[0]} on: it diverged; leave the "
                                f"recipe out for all arms")
            other = [part for part in name[1].split(",") if part.startswith(("replay=", "total_batch_size="))]
            hashes = [r["stream_hash"] for r in mine]
            if hashes != streams.setdefault((s, *other), hashes):
                raise UserError(f"{who} saw another stream than the other runs of this seed (their stream hashes differ): not comparable; "
                                f"run both arms with the same data, schedule and batch")
            for part, split in ((part, split) for part in ("domain", "general") for split in ("val", "test")):
                if any(not np.array_equal(documents(r, part, split)[:, 1:], documents(c.first[0], part, split)[:, 1:]) for r in mine):
                    raise UserError(f"{who} was scored on other documents than {c.names[0]}: use one held-out set for all")
    return c
