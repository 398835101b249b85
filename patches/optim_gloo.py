"""
The optimizer's communication on CPUs.

Target:   nanochat.optim:MuonAdamW.step
Why:      upstream waits for the futures of its collectives, and gloo's reduce_scatter has none.
Keeps:    everything on one rank and on NCCL; on gloo the same collectives in the same order; asking for a future waits for its collective.
Verified: tests/test_ranks.py, on a tree whose optimizer waits for futures.
"""
from types import SimpleNamespace

import torch
import torch.distributed as dist

SIGNATURE = ("self",)


def started(collective):
    """`collective`, with a future for what it returns."""
    def start(*args, **kwargs):
        work = collective(*args, **kwargs)

        def get_future():
            work.wait()
            future = torch.futures.Future()
            future.set_result(None)
            return future
        return SimpleNamespace(wait=work.wait, get_future=get_future)
    return start


def wrap(original):
    def step(self):
        import nanochat.optim as optim
        if not dist.is_initialized() or dist.get_backend() != "gloo":
            return original(self)
        collective = dist.reduce_scatter_tensor
        names = [(module, name) for module in (dist, optim) for name, value in vars(module).items() if value is collective]
        for module, name in names:  # also where it was imported by name
            setattr(module, name, started(collective))
        try:
            return original(self)
        finally:
            for module, name in names:
                setattr(module, name, collective)
    return step
