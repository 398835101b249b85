"""
Files that are either complete or absent: written under a temporary name, flushed to the disk, then renamed.
"""
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nanochat_cl.command import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well; on any error nothing is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_zip(path: str | Path) -> None:
    """ValueError or OSError where what torch.save wrote is damaged, by its own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("checksum mismatch")
    except zipfile.BadZipFile as e:
        raise ValueError(str(e)) from e


def sha256(path: str | Path) -> str:
    """Of a file's content, in hex."""
    whole = hashlib.sha256()
    with open(path, "rb") as f:
        for part in iter(lambda: f.read(2**20), b""):
            whole.update(part)
    return whole.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as f:
        f.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """UserError where the file is no JSON."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): restore it, or delete it and make again what it belongs to") from e


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """One JSON object a line. Rewritten whole: a line is never half there, whenever the process dies."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: str | Path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]
