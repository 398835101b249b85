"""
The MLP of Model-CL: nanochat's relu^2 layer cut into blocks, of which the shared ones serve every token and few others a chunk.

B rows, T positions, n width, S chunks, G blocks of width b (shared ones first), R routed, k chosen per chunk, M chunks of one length.
"""
from itertools import groupby
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat_cl.accounting import ROUTER_ROWS
from nanochat_cl.routing import Decision


class Blocks(nn.Module):
    """A stack of block matrices (G, b, n). No nn.Linear: conversions that replace linears must not find it."""

    def __init__(self, blocks: int, width: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, width, n_embd))


class BlockSparseMLP(nn.Module):
    """
    In the place of nanochat's MLP, with as many weights: c_fc.weight and c_proj.weight are (G, b, n), rows being hidden units, so
    c_proj is stored transposed. `decision` is set for the length of a forward by `routing.decide`.
    """

    def __init__(self, config: Any):
        super().__init__()
        cl, n = config.cl, config.n_embd
        self.shared, self.routed, self.backend = cl["shared"], cl["blocks"] - cl["shared"], cl["backend"]
        self.c_fc = Blocks(cl["blocks"], cl["block"], n)
        self.c_proj = Blocks(cl["blocks"], cl["block"], n)
        # Sharded AdamW cuts the first dimension, so the ranks must divide it: a few rows more, which no block has and no step moves.
        self.router = nn.Parameter(torch.empty(-(-self.routed // ROUTER_ROWS) * ROUTER_ROWS, n))
        self.balance = nn.Parameter(torch.empty(self.routed))    # added to the scores for choosing, not for gates
        self.register_buffer("usage", torch.empty(self.routed))  # tokens served in training
        self.decision: Decision | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, n), normalised -> (B, T, n)."""
        if self.decision is None:
            raise RuntimeError("a Model-CL layer ran without a routing decision: apply the patches before GPT.forward is called")
        cut = [self.shared, self.routed]
        (fc, fc_routed), (proj, proj_routed) = (m.weight.to(x.dtype).split(cut) for m in (self.c_fc, self.c_proj))
        routed = masked if self.backend == "masked" else bmm
        return relu2(x @ fc.flatten(0, 1).mT) @ proj.flatten(0, 1) + routed(x, fc_routed, proj_routed, self.decision)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def masked(x: Tensor, fc: Tensor, proj: Tensor, decision: Decision) -> Tensor:
    """The reference: every block computes, and the gate of a block that wasn't chosen is 0. fc, proj (R, b, n)."""
    B, S, _ = decision.choice.shape
    gate = decision.gate.new_zeros(B, S, fc.shape[0]).scatter(-1, decision.choice, decision.gate)
    gate = torch.cat([gate[:, i:i + 1].expand(-1, length, -1) for i, length in enumerate(decision.lengths)], dim=1)  # (B, T, R)
    hidden = relu2(x @ fc.flatten(0, 1).mT).unflatten(-1, fc.shape[:2]) * gate.to(x.dtype).unsqueeze(-1)
    return hidden.flatten(-2) @ proj.flatten(0, 1)


class Gather(torch.autograd.Function):
    """
    Blocks weight (R, b, n) at choice (M, k) -> (M, k*b, n). The gradient is one small matmul with a one-hot matrix: a sum in a fixed
    order, exactly 0 where nothing was chosen (indexing's own gradient adds atomically on GPUs and slowly on CPUs).
    """
    @staticmethod
    def forward(ctx, weight: Tensor, choice: Tensor) -> Tensor:
        ctx.save_for_backward(choice)
        ctx.shape = weight.shape
        return weight[choice].flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        choice, = ctx.saved_tensors
        one_hot = F.one_hot(choice.flatten(), ctx.shape[0]).to(grad.dtype)  # (M*k, R)
        return (one_hot.mT @ grad.reshape(one_hot.shape[0], -1)).view(ctx.shape), None


def bmm(x: Tensor, fc: Tensor, proj: Tensor, decision: Decision) -> Tensor:
    """Copy each chunk's blocks together and multiply in batches, one batch per run of chunks of equal length. fc, proj (R, b, n)."""
    (B, _, n), b = x.shape, fc.shape[1]
    out, chunk, position = [], 0, 0
    for length, run in groupby(decision.lengths):
        count = len(list(run))
        here = x[:, position:position + count * length].reshape(B * count, length, n)
        choice = decision.choice[:, chunk:chunk + count].flatten(0, 1)                              # (M, k)
        gate = decision.gate[:, chunk:chunk + count].flatten(0, 1).to(x.dtype)[:, None, :, None]    # (M, 1, k, 1)
        hidden = relu2(here @ Gather.apply(fc, choice).mT).unflatten(-1, (-1, b)) * gate
        out.append((hidden.flatten(-2) @ Gather.apply(proj, choice)).view(B, count * length, n))
        chunk, position = chunk + count, position + count * length
    return torch.cat(out, dim=1)
