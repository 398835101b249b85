"""
The run's own seed.

Target:   nanochat.common:compute_init
Why:      upstream seeds every run with 42, and a comparison needs several seeds.
Keeps:    everything at seed 42; device, process group and return value at any seed.
Verified: tests/test_patching.py, and `python -m nanochat_cl.patching verify`.
"""
import torch

from patches import settings

SIGNATURE = ("device_type",)


def wrap(original):
    def compute_init(*args, **kwargs):
        result = original(*args, **kwargs)
        if settings.seed != settings.DEFAULT_SEED:
            torch.manual_seed(settings.seed)  # every CUDA device too
        return result
    return compute_init
