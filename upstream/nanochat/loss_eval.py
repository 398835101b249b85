"""
Bits per byte: a loss that does not depend on the tokenizer, since it divides by the bytes of the text instead of its tokens.
"""
import math

import torch
import torch.distributed as dist


@torch.no_grad()
def evaluate_bpb(model, batches, steps: int, token_bytes: torch.Tensor) -> float:
    """
    Bits per byte over `steps` batches (x, y) of ids (B, T), summed over all ranks.

    `token_bytes` (V,) holds the byte length of each token. Targets of 0 bytes (special tokens) and ignored targets
    (negative) count neither as bits nor as bytes. `inf` when there are no bytes at all.
    """
    device = model.get_device()
    nats = torch.zeros((), dtype=torch.float32, device=device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=device)
    batches = iter(batches)
    for _ in range(steps):
        x, y = next(batches)
        loss = model(x, y, loss_reduction="none").view(-1)
        y = y.reshape(-1)
        size = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
        nats += torch.where(size > 0, loss, 0.0).sum()
        num_bytes += size.sum()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(nats, op=dist.ReduceOp.SUM)
        dist.all_reduce(num_bytes, op=dist.ReduceOp.SUM)
    if num_bytes.item() == 0:
        return float("inf")
    return nats.item() / (math.log(2) * num_bytes.item())
