"""
The optimizer's communication on CPUs.

Target:   nanochat.optim:MuonAdamW.step
Why:      upstream waits for the futures of its collectives, and gloo's reduce_scatter has none.
Keeps:    everything on one rank and on NCCL; on gloo the same collectives in the same order, as asynchronous as before.
Verified: tests/test_ranks.py, on a tree whose optimizer waits for futures.
"""
from types import SimpleNamespace

import torch.distributed as dist

SIGNATURE = ("self",)


def wrap(original):
    def step(self):
        if not dist.is_initialized() or dist.get_backend() != "gloo":
            return original(self)
        collective = dist.reduce_scatter_tensor

        def started(*args, **kwargs):
            wait = collective(*args, **kwargs).wait
            return SimpleNamespace(wait=wait, get_future=lambda: SimpleNamespace(wait=wait))
        dist.reduce_scatter_tensor = started
        try:
            return original(self)
        finally:
            dist.reduce_scatter_tensor = collective
    return step
