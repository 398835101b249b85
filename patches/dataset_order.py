"""
Another seed, another order of the training shards.

Target:   nanochat.dataset:list_parquet_files
Why:      seeds that differ only in the initial weights understate what the order of the data does to a result.
Keeps:    everything at seed 42; at any seed the set of shards, and the last one as validation. The order depends on seed and
          file names only, so all arms of a seed read the same text in the same order, on any number of ranks.
Verified: tests/test_patching.py, and `python -m nanochat_cl.patching verify`.
"""
import os

from nanochat_cl.seeds import seed_for
from patches import settings

SIGNATURE = ("data_dir", "warn_on_legacy")


def wrap(original):
    def list_parquet_files(*args, **kwargs):
        paths = original(*args, **kwargs)
        if settings.seed == settings.DEFAULT_SEED:
            return paths
        order = seed_for(settings.seed, "phase-a-order")
        return [*sorted(paths[:-1], key=lambda path: seed_for(order, os.path.basename(path))), *paths[-1:]]
    return list_parquet_files
