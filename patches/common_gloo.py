"""
Several ranks without a GPU.

Target:   nanochat.common:compute_init
Why:      upstream makes a process group on CUDA only: elsewhere its ranks would train on without ever averaging their gradients.
Keeps:    one process, and any number on CUDA; the return value everywhere.
Verified: tests/test_ranks.py.
"""
import torch.distributed as dist

from nanochat_cl import runs

SIGNATURE = ("device_type",)


def wrap(original):
    def compute_init(*args, **kwargs):
        result = original(*args, **kwargs)
        if result[0] and not dist.is_initialized():  # launched by torchrun
            dist.init_process_group("gloo", timeout=runs.RANK_TIMEOUT)
        return result
    return compute_init
