"""
A row without a gradient stays exactly as it is.

Target:   nanochat.optim:MuonAdamW._compute_adamw
Why:      stale moments and weight decay go on moving the embeddings of tokens that the batch doesn't hold.
Keeps:    groups without the key `rows` go to the original untouched; the arithmetic of a row that moves is the original kernel's.
Verified: tests/test_isolation.py.
"""
import functools

import torch

SIGNATURE = ("self", "group", "info", "gather_list", "rank", "world_size")


def row_step(kernel):
    """`kernel` (nanochat's adamw_step_fused), undone where a whole row of the gradient is zero."""
    def step(p, grad, exp_avg, exp_avg_sq, *scalars):
        moves = grad.flatten(1).any(-1).view(-1, *[1] * (grad.ndim - 1))
        before = [t.clone() for t in (p, exp_avg, exp_avg_sq)]
        kernel(p, grad, exp_avg, exp_avg_sq, *scalars)
        for now, old in zip((p, exp_avg, exp_avg_sq), before):
            now.copy_(torch.where(moves, now, old))
    return step


def wrap(original):
    @functools.wraps(original)
    def _compute_adamw(self, group, info, gather_list, rank, world_size):
        if not group.get("rows"):
            return original(self, group, info, gather_list, rank, world_size)
        import nanochat.optim as optim
        kernel = optim.adamw_step_fused
        optim.adamw_step_fused = row_step(kernel)
        try:
            return original(self, group, info, gather_list, rank, world_size)
        finally:
            optim.adamw_step_fused = kernel
    return _compute_adamw
