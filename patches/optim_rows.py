"""
A row without a gradient stays exactly as it is.

Target:   nanochat.optim:MuonAdamW._compute_adamw
Why:      stale moments and weight decay go on moving the embeddings of tokens that the batch doesn't hold.
Keeps:    groups without the key `rows` go to the original untouched; the arithmetic of a row that moves is the original kernel's.
Verified: tests/test_isolation.py.
"""
import torch

# `rows` of a group: pieces of a row that are left alone each by itself, one for each head whose value embedding it holds; else 1.
SIGNATURE = ("self", "group", "info", "gather_list", "rank", "world_size")


def row_step(kernel, pieces):
    """`kernel` (nanochat's adamw_step_fused), undone where a whole row, or one of its `pieces`, of the gradient (N, n) is zero."""
    def step(p, grad, exp_avg, exp_avg_sq, *scalars):
        moves = grad.unflatten(-1, (pieces, -1)).any(-1, keepdim=True)                          # (N, pieces, 1)
        tensors = [t.unflatten(-1, (pieces, -1)) for t in (p, exp_avg, exp_avg_sq)]
        kept = [t.clone() for t in tensors]  # whole: to pick out the rows would wait for the GPU
        kernel(p, grad, exp_avg, exp_avg_sq, *scalars)
        for now, old in zip(tensors, kept):
            torch.where(moves, now, old, out=now)
    return step


def wrap(original):
    def _compute_adamw(self, group, info, gather_list, rank, world_size):
        if not group.get("rows"):
            return original(self, group, info, gather_list, rank, world_size)
        import nanochat.optim as optim
        kernel = optim.adamw_step_fused
        optim.adamw_step_fused = row_step(kernel, group["rows"])
        try:
            return original(self, group, info, gather_list, rank, world_size)
        finally:
            optim.adamw_step_fused = kernel
    return _compute_adamw
