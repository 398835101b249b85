"""
The domain of Phase B: documents with a sub-domain each, cut into train, val and test, free of overlap with what is held out anywhere.

A domain is a recipe in nanochat_cl/domains/<name>.json, or in a file of that form; or just files:<folder or glob>, or
hf:<dataset>[:config][:column]. Of a recipe:

    description
    order       of the sub-domains: seed, name, size, given (as the sources come) or time (all documents by time, sub-domains by their first)
    sources     [{"source", and how a row names its sub-domain: "value", or "column" with an optional "pattern", whose first group is the name,
                and "values" (read no further when all are full); "key", a column that pieces of one work have in common; "time", one with a
                year or an ISO date, compared as text (default: time; of a text file its last change, which a copy sets anew)}]
    questions   [path or glob of jsonl files as exam.read takes them, from the recipe's folder, or {"name", ...}: sources.questions]

python -m nanochat_cl.domain --profile cpu
python -m nanochat_cl.domain --profile gpu1 --domain 'files:/data/company'   # sub-domain = top folder
"""
import argparse
import glob
import re
import shutil
from collections import Counter
from pathlib import Path

from nanochat_cl import corpus, files, sources
from nanochat_cl.command import UserError, run
from nanochat_cl.holdout import HELD_OUT, NEAR, NGRAM, WORD, Overlap, digest, split_of
from nanochat_cl.profiles import PROFILES
from nanochat_cl.sources import Document, checksums, read_parquet, said, verify, write_parquet

RECIPES = Path(__file__).parent / "domains"
OTHERS = "the path of a recipe, files:<folder or glob> or hf:<dataset>[:config][:column]"
CAP = {"train": 1.0, "val": 0.2, "test": 0.2}  # shares of the limit: a large package gives more held-out documents than 5 % of it


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    flags = corpus.parser("domain", "Make the documents of Phase B: $NANOCHAT_BASE_DIR/corpora/<domain>/{train,val,test}.parquet")
    flags.add_argument("--domain", help=f"{', '.join(shipped())}, {OTHERS} (default: the profile's)")
    flags.add_argument("--order", choices=["seed", "name", "size", "given", "time"],
                       help="of the sub-domains (default: the recipe's, else seed)")
    flags.add_argument("--subdomain-mb", type=float, help="most text of a sub-domain (default: 8 of them last for Phase B)")
    args = flags.parse_args(argv)
    args.domain = args.domain or PROFILES[args.profile].domain
    # At least 1.5 MB, so that a sub-domain's 5 % are still some documents
    args.subdomain_mb = args.subdomain_mb or max(1.5, PROFILES[args.profile].max_tokens * corpus.BYTES_PER_TOKEN / 8 / 1e6)
    return args


def shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.json"))}


def name_of(domain: str) -> str:
    """The folder of a domain in <base>/corpora: its own name, or the last part of the folder or dataset it is read from."""
    kind, _, rest = domain.partition(":")
    path = sources.files_root(rest).resolve() if kind == "files" else Path(rest.split(":")[0] or domain.removesuffix(".json"))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.name)


def items(base: Path, questions: list[Path]) -> tuple[list[str], int]:
    """The items of `questions` and under `base`, with their right answers; how many are left out: under 13 words, too common to compare."""
    from nanochat_cl import exam
    read = [item for path in [*sorted(base.glob("eval/*/*.jsonl")), *questions] for item in exam.read(path, 10**9)]
    read += [item for group in exam.CORE for item in exam.core(base / "eval_bundle", group, 10**9)]
    texts = [(i.context if isinstance(i.context, str) else i.context[i.gold]) + i.choices[i.gold] for i in read]
    compared = [text for text in texts if len(WORD.findall(text)) >= NGRAM]
    return compared, len(texts) - len(compared)


def gather(source: dict, limit: float, args: argparse.Namespace, skipped: dict) -> list[Document]:
    """The documents of one source, each sub-domain up to `limit` bytes of each class, times CAP."""
    if source["source"] == "embedded":
        installed = [name for name in source["packages"] if (args.packages / name).is_dir()][:source["most"]]
        documents = sources.extract(sources.code, sources.modules(args.packages, installed), args.workers)
    else:
        documents = sources.read(source["source"], skipped, source)
    found, size = [], Counter()
    for d in documents:
        split = split_of(d.key)
        if size[d.subdomain, split] < limit * CAP[split]:
            found.append(d)
            size[d.subdomain, split] += len(d.text.encode())
        elif all(size[name, "train"] >= limit for name in source.get("values", [source.get("value")])):
            break
    return found


def build(args: argparse.Namespace) -> None:
    from nanochat.common import get_base_dir
    folder = Path(get_base_dir()) / "corpora" / name_of(args.domain)
    if folder.name == "general":
        raise UserError("a domain cannot be called general: that is the corpus of Phase A; rename its folder")
    recipe = recipe_of(args.domain)
    asked = {"domain": args.domain, "recipe": recipe, "order": args.order or recipe.get("order", "seed"), "subdomain_mb": args.subdomain_mb}
    general, made = corpus.complete(args.profile), corpus.manifest(folder, asked)
    found = (path for entry in recipe.get("questions", []) for path in (
        [fetched(entry, folder / "questions")] if isinstance(entry, dict) else sorted(glob.glob(entry)) or [entry]))
    questions = list(dict.fromkeys(map(Path, found)))
    if bad := [path for path in questions if not path.is_file() or [q.name for q in questions].count(path.name) > 1]:
        raise UserError(f"{args.domain} names questions at {bad[0]}: expected a jsonl file there, and no other one of that name")
    evaluation, short = items(folder.parent.parent, questions)
    asked_here = {path.name: path.read_text("utf-8") for path in questions}
    compared = {"number": len(evaluation), "too_short": short, "sha256": digest("\n".join([*evaluation, *asked_here.values()]))}
    if made and (made["items"], made["general_files"]) == (compared, general["files"]):
        verify(folder, made["files"], folder)
        print(f"domain | complete: {made['documents']['train']:,} training documents in {folder}")
        return
    print(f"domain | {args.domain} -> {folder}", flush=True)
    made = {**asked, "items": compared, **_write(args, recipe, asked["order"] == "time", folder, evaluation)}
    shutil.rmtree(folder / "questions", ignore_errors=True)
    for name, text in asked_here.items():
        files.write_text(folder / "questions" / name, text)
    held = [d.text for c in HELD_OUT for d in read_parquet(folder / f"{c}.parquet")]
    made |= corpus.prune(Overlap({"near_domain": held, "near_evaluation": evaluation}, args.workers))
    files.write_json(folder / "corpus.json", made)
    print(table(made["subdomains"]))
    print(f"domain | {len(evaluation):,} evaluation items compared, {short:,} too short for it; dropped here {made['dropped']}, "
          f"from the general corpus {made['general_pruned']}; held-out documents near an item (kept): {made['held_out_near_evaluation']}; "
          f"skipped: {made['skipped']}; next: python -m nanochat_cl.tokenizer --profile {args.profile}")


def fetched(entry: dict, folder: Path) -> Path:
    """The jsonl file of a hub's questions, read once."""
    path = folder / f"{entry['name']}.jsonl"
    if not path.is_file():
        files.write_jsonl(path, list(sources.questions(entry)))
    return path


def recipe_of(domain: str) -> dict:
    """The recipe of that name or path, or the one of a single source."""
    if ":" in domain:
        return {"sources": [{"source": domain}]}
    path = shipped().get(domain, Path(domain))
    if not path.is_file():
        raise UserError(f"no domain {domain!r}: expected {', '.join(shipped())}, {OTHERS}")
    recipe = files.read_json(path)
    return recipe | {"questions": [
        entry if isinstance(entry, dict) else str(path.resolve().parent / entry) for entry in recipe["questions"]]} if "questions" in recipe else recipe


def _write(args: argparse.Namespace, recipe: dict, by_time: bool, folder: Path, evaluation: list[str]) -> dict:
    """Write train, val and test; their part of the manifest."""
    skipped = {}
    documents = [d for source in recipe["sources"] for d in gather(source, args.subdomain_mb * 1e6, args, skipped)]
    if by_time and (without := [d.subdomain for d in documents if not d.time]):
        raise UserError(f"the order of time needs one of every document, and {len(without):,} have none, as in {without[0]}; say which column "
                        f"it is: \"time\" in the source of a recipe")
    documents.sort(key=lambda d: d.time if by_time else "")  # stable
    parts = {"train": [], **corpus.held_out(documents, float("inf"), skipped, args.workers)}
    held = [d.text for c in HELD_OUT for d in parts[c]]
    general = [d.text for c in HELD_OUT for d in read_parquet(folder.parent / "general" / f"{c}.parquet")]
    overlap = Overlap({"near_domain": held, "near_general": general, "near_evaluation": evaluation}, args.workers)
    near_items = {name: int((overlap.of(texts)[:, 2] >= NEAR).sum()) for name, texts in (("domain", held), ("general", general))}
    share, size, dropped = Counter(), Counter(), dict.fromkeys([*overlap.groups, "exact"], 0)
    for d, shared in corpus.screened(documents, overlap, set(map(digest, [*held, *general])), dropped):
        parts["train"].append(d)
        share[d.subdomain] += shared
        size[d.subdomain] += len(d.text.encode())
    counts, subdomains = Counter((d.subdomain, split) for split, found in parts.items() for d in found), {}
    for name in dict.fromkeys(d.subdomain for d in documents):
        row = {split: counts[name, split] for split in parts}
        if all(row.values()):
            subdomains[name] = {**row, "bytes": size[name], "mean_share": share[name] / row["train"]}
        else:
            skipped.setdefault("sub-domains too small for documents in train, val and test", []).append(name)
    if not subdomains:
        raise UserError(f"{args.domain} leaves no usable sub-domain; dropped: {dropped}; skipped: {said(skipped)}")
    for split, found in parts.items():
        write_parquet(folder / f"{split}.parquet", [d for d in found if d.subdomain in subdomains])
    return {"documents": {split: sum(row[split] for row in subdomains.values()) for split in parts}, "subdomains": subdomains,
            "dropped": dropped, "held_out_near_evaluation": near_items, "skipped": said(skipped), "files": checksums(folder)}


def table(rows: dict[str, dict]) -> str:
    """Rows by sub-domain; `mean_share` is of the 13-grams that a training document has in common with held-out ones."""
    columns = list(next(iter(rows.values())))
    lines = [f"{'sub-domain':32}" + "".join(f"{column:>12}" for column in columns)]
    for name, row in rows.items():
        lines.append(f"{name[:32]:32}" + "".join(f"{row[c]:12.2%}" if isinstance(row[c], float) else f"{row[c]:12,}" for c in columns))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    build(parse(argv))


if __name__ == "__main__":
    run(main)
