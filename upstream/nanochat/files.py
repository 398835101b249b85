"""
Files that are either complete or absent: written under a temporary name, flushed to the disk, then renamed.
"""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well; on any error nothing of it is left behind."""
    partial = path + ".tmp"
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
