"""
A function over many items by several processes. They are spawned: a fork of a process that reads parquet can hang in Arrow's threads.
An executor, since multiprocessing's Pool waits for ever for a worker that was killed.
"""
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any


def parallel(function: Callable[[Any], Any], items: Sequence, workers: int) -> list:
    """[function(item) for each item], in order, whatever the number of workers; few items are not worth a process."""
    if workers <= 1 or len(items) < 128:
        return [function(item) for item in items]
    return list(_pool(workers).map(function, items, chunksize=max(1, len(items) // (8 * workers))))


@lru_cache(1)
def _pool(workers: int) -> ProcessPoolExecutor:
    """Kept until this process ends, which ends them too."""
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()  # a parent that is killed leaves no orphans
