"""
Which nanochat tree is used: `upstream/` of this checkout, or the one that NANOCHAT_CL_UPSTREAM names.
"""
import hashlib
import os
import runpy
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def tree() -> Path:
    """The folder that holds the packages `nanochat` and `scripts`."""
    return Path(os.environ.get("NANOCHAT_CL_UPSTREAM") or REPO / "upstream").resolve()


def activate() -> None:
    """Put the tree first on the import path. What was imported from another tree before stays what it was."""
    path = str(tree())
    if not (tree() / "nanochat" / "gpt.py").is_file():
        raise SystemExit(f"no nanochat tree at {path}: expected nanochat/gpt.py and scripts/base_train.py there; "
                         f"unset NANOCHAT_CL_UPSTREAM or point it to a nanochat checkout")
    if sys.path[0] != path:
        sys.path[:] = [path, *(p for p in sys.path if p != path)]


def run_script(name: str, flags: list[str]) -> None:
    """Run a module of the tree as a command."""
    before = sys.argv
    sys.argv = [name, *flags]
    try:
        runpy.run_module(name, run_name="__main__")
    finally:
        sys.argv = before


def tree_hash() -> str:
    """sha256 over the names and contents of the tree's Python files: two runs with the same hash ran the same base."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in ("nanochat", "scripts") for p in (tree() / folder).rglob("*.py")):
        digest.update(path.relative_to(tree()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
