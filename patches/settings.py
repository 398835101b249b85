"""
What a patch needs to know and upstream's own scripts can't pass on. At these values every patch is inert.
"""
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_SEED = 42                # the seed that upstream's compute_init sets

seed: int = DEFAULT_SEED         # common_seed, dataset_order
arm: dict | None = None          # gpt_config: the `cl` of a GPTConfig(...) that names none


@contextmanager
def using(seed: int = DEFAULT_SEED, arm: dict | None = None) -> Iterator[None]:
    """Both settings for the length of a block; what is not named has its default there."""
    here = globals()
    before = here["seed"], here["arm"]
    here["seed"], here["arm"] = seed, arm
    try:
        yield
    finally:
        here["seed"], here["arm"] = before
