"""
Documents and where they come from: local files, the hub, and the Python packages of this environment (`embedded`).

Read lazily, in an order that depends on names and contents only. What cannot be used is named in `skipped`: {reason: names}.
"""
import ast
import glob
import json
import logging
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_cl import files
from nanochat_cl.command import UserError
from nanochat_cl.holdout import digest
from nanochat_cl.parallel import parallel

LARGEST = 10_000_000  # characters of one document: beyond it is a dump, not a text
ROWS = {".jsonl", ".parquet"}
TEXT = set(".txt .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .scala .kt .jl .r .lua .sh .sql".split())
# Tools, and what only tests install: the embedded corpora must not depend on them.
NOT_OURS = set("scipy hypothesis sortedcontainers xdist execnet _pytest pytest pip setuptools pkg_resources _distutils_hack nanochat_cl".split())
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
TESTS = {"test", "tests", "testing", "_tests", "conftest"}


class Document(NamedTuple):
    text: str
    subdomain: str
    key: str  # decides the class (holdout.split_of): package/module for `embedded`, a recipe's column, else a hash of the text
    time: str = ""  # sorts; not stored


STORED = ("text", "subdomain", "key")


def said(skipped: dict[str, list[str]]) -> str:
    parts = [f"{len(names):,} {reason} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for reason, names in skipped.items()]
    return "; ".join(parts) or "none"


def write_parquet(path: Path, documents: list[Document]) -> None:
    """A shard in nanochat's layout; at least 8 row groups where it has 8 documents, so that each of 8 ranks finds one."""
    table = pa.table({name: pa.array([getattr(d, name) for d in documents], pa.string()) for name in STORED})
    with files.replacing(path) as f:
        pq.write_table(table, f, compression="zstd", compression_level=3, row_group_size=max(1, min(1024, len(documents) // 8)))


def read_parquet(path: Path) -> list[Document]:
    return [Document(**row) for row in pq.read_table(path, columns=list(STORED)).to_pylist()]


def checksums(folder: Path) -> dict[str, str]:
    """{name: sha256} of the parquet files in a folder."""
    return {path.name: files.sha256(path) for path in sorted(folder.glob("*.parquet"))}


def verify(folder: Path, expected: dict[str, str], remake: Path) -> None:
    """UserError names a parquet file that is not as `expected`, a result of `checksums` ({}: not known), and the folder to `remake`."""
    found = checksums(folder) if expected else {}
    if bad := sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)):
        raise UserError(f"{folder / bad[0]} is damaged, missing or not ours: its sha256 is not the one in corpus.json; "
                        f"delete {remake} and run the same command again")


def read(source: str, skipped: dict[str, list[str]], label: dict | None = None, place: dict | None = None) -> Iterator[Document]:
    """
    Documents of `files:<folder or glob>` or `hf:<dataset>[:config][:column]`. `label` says what names the sub-domain: {"value": name}, or
    {"column": c, "pattern": regular expression whose first group is the name (rows without a match are left out)}; otherwise a column
    `subdomain`, the top folder, or the file's name. Its "key" is a column that pieces of one work share: they are held out together.
    Its "time" is a column with an ISO date or a year (default: time; of a text file its last change).
    Its "data_files" picks files of a hub dataset. `place` of a hub dataset always says where to read on; {} is the beginning.
    """
    label = label or {}
    kind, _, rest = source.partition(":")
    if kind not in ("files", "hf") or not rest:
        raise UserError(f"a source is embedded, files:<folder or glob> or hf:<dataset>[:config][:column], got {source!r}")
    dataset, config, column = (*rest.split(":"), "", "")[:3]
    named, seen = {label[use] for use in ("column", "key", "time") if use in label}, set()
    for *_, row in _file_rows(rest, {}) if kind == "files" and named else ():  # to the first row that has them
        seen.update(row if isinstance(row, dict) else ())
        if named <= seen:
            break
    if kind == "files" and not named <= seen:
        raise UserError(f"no row of {source} has the column {', '.join(sorted(named - seen))}; there are: {', '.join(sorted(seen))}")
    rows = _file_rows(rest, skipped) if kind == "files" else _hub_rows(
        dataset, config, column or "text", named, label.get("data_files"), {} if place is None else place)
    for name, default, row in rows:
        text = row.get("text") if isinstance(row, dict) else None
        is_text = isinstance(text, str) and bool(text.strip())
        if not is_text or len(text) > LARGEST:
            skipped.setdefault(f"longer than {LARGEST:,} characters" if is_text else "without text", []).append(name)
            continue
        text = text.encode("utf-8", "ignore").decode()  # JSON can spell half a character
        known = lambda column: "" if row.get(column) is None else str(row[column])  # 0 is a name, too
        subdomain = label.get("value") or known(label.get("column", "subdomain")) or default
        if match := re.search(label.get("pattern", "(.+)"), subdomain, re.MULTILINE):
            yield Document(text, match.group(1), known(label.get("key")) or digest(text), known(label.get("time", "time")))


def files_root(pattern: str) -> Path:
    """The folder that names below are relative to: the longest part of a glob without wildcards."""
    path = Path(pattern)
    return next(p for p in (path, *path.parents) if not re.search(r"[*?\[]", str(p)) and not p.is_file())


def _file_rows(pattern: str, skipped: dict[str, list[str]]) -> Iterator[tuple[str, str, dict]]:
    """(name, the sub-domain of a row that names none, row) per document; hidden files are left out."""
    root = files_root(pattern)
    found = glob.glob(f"{glob.escape(pattern)}/**" if Path(pattern).is_dir() else pattern, recursive=True)
    found = sorted(path for path in map(Path, found) if path.is_file())
    expected = "expected txt, md, jsonl, parquet or source code"
    if not found:
        raise UserError(f"no files match {pattern!r}: {expected} there")
    if other := [path for path in found if path.suffix.lower() not in TEXT | ROWS]:
        raise UserError(f"cannot read {other[0]}: {expected}; convert it to text, move it away, or narrow the glob, as in "
                        f"'files:{root}/**/*.txt'")
    for path in found:
        name, n = path.relative_to(root).as_posix(), 0
        default = name.split("/")[0] if "/" in name else path.stem if path.suffix.lower() in ROWS else root.resolve().name
        try:
            for n, row in enumerate(read_rows(path), 1):
                yield f"{name}:{n}", default, row  # a line of jsonl that is no JSON is None
        except (ValueError, OSError, pa.ArrowException) as e:
            skipped.setdefault("unreadable from there on", []).append(f"{name}:{n + 1}: {' '.join(str(e).split())[:200]}")


def read_rows(path: Path) -> Iterator[dict | None]:
    """Rows of a parquet or jsonl file, None for a line that is no JSON; any other file is one row with its text."""
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as shard:
            for batch in shard.iter_batches(256):
                yield from batch.to_pylist()
    else:
        with open(path, encoding="utf-8") as f:
            yield from map(_json, filter(str.strip, f)) if path.suffix.lower() == ".jsonl" else [
                {"text": f.read(), "time": datetime.fromtimestamp(path.stat().st_mtime).isoformat()}]


def _json(line: str) -> Any:
    with suppress(ValueError):
        return json.loads(line)


def questions(entry: dict) -> Iterator[dict]:
    """
    Choice questions of a hub dataset as exam.read takes them. entry: "source" hf:<dataset>[:config], "split", the columns "question", "answer"
    and perhaps "context" (a dot leads into a column), and "choices": the column of a mapping whose keys are answers, a list of columns
    whose places are, or under "answers" the texts themselves.
    """
    dataset, config = (*entry["source"].removeprefix("hf:").split(":"), "")[:2]

    def field(row: dict, path: str) -> Any:
        for part in path.split("."):
            row = row[part]
        return " ".join(row) if isinstance(row, list) else row
    for name, _, row in _hub_rows(dataset, config, entry["question"], {entry["answer"]}, None, {}, entry.get("split", "train")):
        try:
            named = entry.get("choices")
            if isinstance(named, str):
                options = field(row, named)
            elif named:
                options = {i: row[column] for i, column in enumerate(named)}
            else:
                options = {text: text for text in entry["answers"]}
            yield {**{part: field(row, entry[part]) for part in ("context", "question") if part in entry},
                   "choices": list(options.values()), "answer": list(options).index(row[entry["answer"]])}
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{name} is no question of the form {entry}: {e!r}; it has {', '.join(sorted(row))}") from e


def _hub_rows(dataset: str, config: str, column: str, named: set[str], data_files: str | None, place: dict,
              split: str = "train") -> Iterator[tuple[str, str, dict]]:
    import datasets  # slow to import, and needed here alone
    for name in ("huggingface_hub", "httpx", "httpx2"):  # they report each retry and each request
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split, streaming=True, data_files=data_files)
        if place:
            rows.load_state_dict(place["state"])  # of the files before this one at most the last is opened again
        for n, row in enumerate(rows, place.get("row", 0) + 1):
            if missing := {column, *named - {"text"}} - row.keys():  # text is what `column` is called
                raise ValueError(f"no column {', '.join(map(repr, sorted(missing)))} but {', '.join(sorted(row))}")
            place |= {"row": n, "state": rows.state_dict()}
            yield f"{dataset}#{n}", Path(dataset).name, {**row, "text": row[column]}
    except Exception as e:  # the hub fails in the ways of five libraries; whatever it is, the remedy is the user's
        line = " ".join(str(e).split())[:200]
        raise UserError(f"cannot read the dataset {dataset!r}: {line}; check name, config, column and network, accept its terms and run "
                        f"hf auth login if it has any, or use embedded or files:<folder>") from e


def modules(root: Path, packages: list[str] | None = None) -> list[tuple[str, Path]]:
    """(package/module, file) of the packages under `root`, tests left out, in the order of a hash: any beginning is a fair sample."""
    packages = [p.name for p in root.iterdir() if p.name.isidentifier() and p.name not in NOT_OURS] if packages is None else packages
    found = {path.relative_to(root).with_suffix("").as_posix(): path for package in packages for path in (root / package).rglob("*.py")}
    names = [name for name in found if not TESTS & set(name.split("/")) and not found[name].name.startswith("test_")]
    return [(name, found[name]) for name in sorted(names, key=digest)]


def extract(function: Callable[[str], str | None], items: list[tuple[str, Path]], workers: int) -> list[Document]:
    """`function(source)` of every module, as documents in the order of `items`, without those that give None or are no Python."""
    texts = parallel(partial(_extract, function), items, workers)
    return [Document(text, key.split("/")[0], key) for (key, _), text in zip(items, texts) if text]


def _extract(function: Callable[[str], str | None], item: tuple[str, Path]) -> str | None:
    try:
        with tokenize.open(item[1]) as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            return function(f.read())
    except (SyntaxError, ValueError, RecursionError):
        return None


def prose(source: str) -> str | None:
    """The docstrings of a module, dedented, in their order, without doctests (they are code); None if that is next to nothing."""
    documented = [n for n in ast.walk(ast.parse(source)) if isinstance(n, DOCUMENTED)]
    found = [ast.get_docstring(n) or "" for n in sorted(documented, key=lambda n: getattr(n, "lineno", 0))]
    found = [re.sub(r"^[ \t]*>>>.*\n(?:[ \t]*\S.*\n)*", "", text + "\n", flags=re.MULTILINE) for text in found]
    text = "\n\n".join(dict.fromkeys(re.sub(r"\n{3,}", "\n\n", t).strip() for t in found if len(t) >= 40))
    return text if len(text) >= 200 else None


def code(source: str) -> str | None:
    """
    A module as `ast.unparse` prints it: without comments, and here without statements that are only a string. None for a module that
    holds little code or mostly literals (tables and texts). Raises SyntaxError.
    """
    length = lambda node: len(repr(node.value)) if isinstance(node, ast.Constant) and not isinstance(node.value, bool | None) else 0
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, field, None), list):  # of a lambda it is none
                kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(getattr(s.value, "value", 0), str))]
                body[:] = kept or [ast.Pass()] * bool(body)
    text, literals = ast.unparse(tree) + "\n", sum(map(length, ast.walk(tree)))
    return text if len(text) >= 200 and 2 * literals <= len(text) else None
