"""
A function over many items by several processes. They are spawned: a fork of a process that reads parquet can hang in Arrow's threads.
An executor, since multiprocessing's Pool waits for ever for a worker that was killed.
"""
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import Any


def parallel(function: Callable[[Any], Any], items: Sequence, workers: int) -> list:
    """[function(item) for each item], in order, whatever the number of workers; few items are not worth a process."""
    if workers <= 1 or len(items) < 128:
        return [function(item) for item in items]
    return list(_pool(workers).map(function, items, chunksize=max(1, len(items) // (8 * workers))))


@lru_cache(1)
def _pool(workers: int) -> ProcessPoolExecutor:
    """Kept until this process ends, which ends them too; Ctrl-C is this process's to hear."""
    return ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
