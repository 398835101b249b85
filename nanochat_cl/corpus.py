"""
The general corpus of Phase A: parquet shards in nanochat's layout, and the held-out documents that no phase trains on.

python -m nanochat_cl.corpus --profile cpu                                             # docstrings of the installed packages
python -m nanochat_cl.corpus --profile gpu1 --source 'files:/data/books' --tokens 2e9  # txt, md, jsonl, parquet or source code
"""
import argparse
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from nanochat_cl import files, pretrain, sources
from nanochat_cl.command import UserError, run
from nanochat_cl.holdout import HELD_OUT, NEAR, Overlap, digest, split_of
from nanochat_cl.profiles import PROFILES
from nanochat_cl.sources import Document, checksums, read_parquet, said, verify, write_parquet

BYTES_PER_TOKEN = 4.2       # English at a vocabulary of 32K (est.): turns --tokens into bytes
CROPPED = 0.4               # of the text is thrown away by nanochat's packing (35 % at 2,048 tokens, rounded up)
COPIES = "held-out copies of held-out documents"
HELD_OUT_BYTES = 8_000_000  # at most, of each held-out class
# nanochat's own shuffled shards: the beginning of hf:HuggingFaceFW/fineweb-edu:sample-100BT:text is not a sample of it
NAMED = {"fineweb-edu": "hf:karpathy/fineweb-edu-100b-shuffle::text", "climbmix": "hf:karpathy/climbmix-400b-shuffle::text"}


def parser(stage: str, description: str) -> argparse.ArgumentParser:
    """The flags that the stages of data have in common."""
    result = argparse.ArgumentParser(prog=f"nanochat_cl.{stage}", description=description)
    result.add_argument("--profile", choices=PROFILES, default="cpu", help="sizes of the run (default: %(default)s)")
    result.add_argument("--packages", type=Path, default=Path(sysconfig.get_paths()["purelib"]),
                        help="packages for embedded (default: this environment's)")
    result.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes (default: %(default)s)")
    return result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser("corpus", "Make the general corpus of Phase A")
    flags.add_argument("--source", help=f"embedded, {', '.join(NAMED)}, files:<folder or glob> or "
                                        f"hf:<dataset>[:config][:column] (default: the profile's)")
    flags.add_argument("--tokens", type=float, help="stop at about so many (default: all of embedded and files:, else Phase A's)")
    flags.add_argument("--docs-per-shard", type=int, help="a run's seed permutes shards, so make several (default: 128 on cpu, else 16384)")
    args = flags.parse_args(argv)
    args.source = args.source or PROFILES[args.profile].general
    args.docs_per_shard = args.docs_per_shard or (128 if args.profile == "cpu" else 16384)
    if args.tokens is None and not args.source.startswith(("embedded", "files:")):
        flags = pretrain.parse(["--profile", args.profile]).flags
        args.tokens = math.prod(pretrain.horizon(flags, PROFILES[args.profile].vocab_size)) / (1 - CROPPED)
    return args


def build(args: argparse.Namespace) -> None:
    from nanochat.common import get_base_dir
    from nanochat.dataset import DATA_DIR
    data_dir, general = Path(DATA_DIR), Path(get_base_dir()) / "corpora" / "general"
    asked = {"source": args.source, "tokens": args.tokens, "docs_per_shard": args.docs_per_shard}
    if found := manifest(data_dir, asked):
        verify(data_dir, found["files"], data_dir)
        verify(general, found.get("held_out_files", {}), data_dir)
        print(f"corpus | complete: {found['documents']['train']:,} training documents in {data_dir}")
        return
    state = manifest(data_dir, asked, partial := "corpus.partial.json")  # of a build that died; it tells our shards from others'
    if state is None and any(data_dir.glob("*.parquet")):
        raise UserError(f"{data_dir} holds shards that are not ours; move them away, or use another NANOCHAT_BASE_DIR")
    print(f"corpus | {args.source} -> {data_dir}", flush=True)
    if args.source == "embedded":
        embedded = sources.extract(sources.prose, sources.modules(args.packages), args.workers)
        read = lambda skipped, place: iter(embedded)
    else:
        read = lambda skipped, place: sources.read(NAMED.get(args.source, args.source), skipped, None, place)
    skipped = {}
    if state is None:
        for c, documents in held_out(read(skipped, None), HELD_OUT_BYTES, skipped, args.workers).items():
            write_parquet(general / f"{c}.parquet", [d._replace(subdomain="general") for d in documents])
    held, shard = {c: read_parquet(general / f"{c}.parquet") for c in HELD_OUT}, "shard_{:05d}.parquet".format
    state = state or {**asked, "read": 0, "place": {}, "shards": 0, "bytes": 0, "skipped": {}, "dropped": {"near_general": 0, "exact": 0},
                      "held_out_copies": len(skipped.get(COPIES, [])),
                      "documents": {"train": 0, **{c: len(held[c]) for c in held}}}
    overlap = Overlap({"near_general": [d.text for c in HELD_OUT for d in held[c]]}, args.workers)
    seen = {digest(d.text) for c in HELD_OUT for d in held[c]}  # some have no words by which `overlap` could know them
    seen |= {digest(d.text) for number in range(state["shards"]) for d in read_parquet(data_dir / shard(number))}
    source = unread(read, state)
    files.write_json(data_dir / partial, state)
    while state["bytes"] < (args.tokens or float("inf")) * BYTES_PER_TOKEN and (block := list(islice(source, args.docs_per_shard))):
        kept = [d for d, _ in screened(block, overlap, seen, state["dropped"])]
        if kept:
            write_parquet(data_dir / shard(state["shards"]), kept)
        state["read"] += len(block)
        state["shards"] += bool(kept)
        state["documents"]["train"] += len(kept)
        state["bytes"] += sum(len(d.text.encode()) for d in kept)
        files.write_json(data_dir / partial, state)
    if not state["shards"]:
        raise UserError(f"{args.source} leaves no training document; skipped: {said(state['skipped'])}; dropped: {state['dropped']}")
    write_parquet(data_dir / shard(state["shards"]), held["val"])  # sorts last: nanochat's validation split
    state |= {"files": checksums(data_dir), "held_out_files": checksums(general), "skipped": said(state["skipped"])}
    files.write_json(data_dir / "corpus.json", {key: value for key, value in state.items() if key != "place"})
    (data_dir / partial).unlink()
    print(f"corpus | {state['documents']} documents, {state['bytes'] / 1e6:,.1f} MB to train on in {state['shards']} shards; "
          f"dropped {state['dropped']}; skipped: {state['skipped']}; next: python -m nanochat_cl.domain --profile {args.profile}")


def unread(read: Callable[[dict, dict], Iterator[Document]], state: dict) -> Iterator[Document]:
    """What read(skipped, place) has beyond the documents that a build has read. `place` and `skipped` of its state move on with it."""
    if state["place"]:  # a hub goes on where it was
        return read(state["skipped"], state["place"])
    state["skipped"] = {}  # all else is near: it is read again from the start, and what it lacks is counted again
    return islice(read(state["skipped"], state["place"]), state["read"], None)


def manifest(folder: Path, asked: dict, name: str = "corpus.json") -> dict | None:
    """What a folder says of its making, None if nothing. Refuses a folder that was made otherwise."""
    if not (folder / name).is_file():
        return None
    from nanochat_cl import runs  # torch comes with it, which the processes of `parallel` can do without
    found = files.read_json(folder / name)
    runs.check_same(folder, {key: found.get(key) for key in asked}, asked, "delete the folder or use another NANOCHAT_BASE_DIR")
    return found


def complete(profile: str) -> dict:
    """The manifest of the general corpus; UserError where there is none."""
    from nanochat.dataset import DATA_DIR
    path = Path(DATA_DIR) / "corpus.json"
    if not path.is_file():
        raise UserError(f"no general corpus at {DATA_DIR}; make it first: python -m nanochat_cl.corpus --profile {profile}")
    return files.read_json(path)


def fingerprint(manifest: dict, key: str = "files") -> str | None:
    """16 hex digits for the text whose checksums a manifest has under `key`; None where it has none."""
    return digest(json.dumps(manifest[key], sort_keys=True)) if key in manifest else None


def held_out(documents: Iterable[Document], limit: float, skipped: dict, workers: int) -> dict[str, list[Document]]:
    """The held-out documents at the beginning of a corpus, `limit` bytes a class: no copies, no test document near to a val document."""
    found, size, seen = {c: [] for c in HELD_OUT}, dict.fromkeys(HELD_OUT, 0), set()
    for d in documents:
        split = split_of(d.key)
        if split == "train" or size[split] >= limit:
            continue
        if (name := digest(d.text)) in seen:
            skipped.setdefault(COPIES, []).append(d.key)
        else:
            seen.add(name)
            found[split].append(d)
            size[split] += len(d.text.encode())
            if min(size.values()) >= limit:
                break
    val = Overlap({"val": [d.text for d in found["val"]]}, workers)
    shares = val.of([d.text for d in found["test"]])
    if near := [d.key for d, share in zip(found["test"], shares) if share >= NEAR]:
        skipped.setdefault(COPIES, []).extend(near)
    found["test"] = [d for d, share in zip(found["test"], shares) if share < NEAR]
    if not all(found.values()):
        raise UserError(f"too few documents: of the two held-out classes (5 % each) one is empty, a few hundred documents are needed; "
                        f"skipped: {said(skipped)}")
    return found


def screened(documents: Iterable[Document], overlap: Overlap, seen: set[str], dropped: dict) -> Iterator[tuple[Document, float]]:
    """Training documents and what share of each is held out: no near duplicates, no exact ones of `seen`. `dropped` counts by group."""
    documents = [d for d in documents if split_of(d.key) == "train"]
    for d, shares in zip(documents, overlap.of([d.text for d in documents])):
        reason = overlap.groups[shares.argmax()] if shares.max() >= NEAR else "exact" if (name := digest(d.text)) in seen else None
        if reason:
            dropped[reason] += 1
        else:
            seen.add(name)
            yield d, shares.max()


def prune(overlap: Overlap) -> dict[str, dict]:
    """
    Take the near duplicates of `overlap`'s texts out of the training shards of a complete corpus. {"general_pruned": how many there were,
    by group, "general_files": checksums of what is left}.
    """
    from nanochat.dataset import DATA_DIR
    data_dir, pruned, left = Path(DATA_DIR), dict.fromkeys(overlap.groups, 0), 0
    state = files.read_json(data_dir / "corpus.json")
    files.write_json(data_dir / "corpus.json", {**state, "files": {}})  # whoever stops here has no wrong checksums, and begins again
    for path in sorted(data_dir.glob("*.parquet"))[:-1]:
        shard = read_parquet(path)
        kept = [d for d, _ in screened(shard, overlap, set(), pruned)]
        if len(kept) < len(shard):
            write_parquet(path, kept)
        left += len(kept)
    state["documents"]["train"], state["files"] = left, checksums(data_dir)
    state["dropped"] |= {group: state["dropped"].get(group, 0) + count for group, count in pruned.items()}
    files.write_json(data_dir / "corpus.json", state)
    return {"general_pruned": pruned, "general_files": state["files"]}


def main(argv: list[str] | None = None) -> None:
    build(parse(argv))


if __name__ == "__main__":
    run(main)
