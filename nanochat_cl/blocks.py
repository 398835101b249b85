"""
The layers of Model-CL: nanochat's relu^2 MLP cut into blocks, and its attention by heads. Shared ones serve every token, a few others
a chunk. No nn.Linear: conversions that replace linears must not find them.

B rows, T positions, n width, S chunks, G blocks of width b (shared ones first), R routed, k chosen per chunk, M chunks of one length,
H heads (shared ones first) of width D, K key/value heads.
"""
from itertools import groupby
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat_cl.routing import Decision, Routed

# Tokens: for chunks below, every block is computed. Of dense's time, n 256, T 512, bfloat16 on a CPU: 0.56 against 0.61 with all chosen
# ones copied; in float32, and at n 768, T 2048, no difference (2026-11-25).
SHORT = 64
COPY_AGAIN = {"cuda"}  # devices on which memory is dearer than a second copy: at d20 with 65,536 tokens 1.3 of a layer's 3.9 GB (traced, not run)


class Blocks(nn.Module):
    """A stack of matrices (G, b, n), as one linear layer n -> G*b."""

    def __init__(self, blocks: int, width: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, width, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).flatten(0, 1).mT


class BlockSparseMLP(Routed):
    """
    In the place of nanochat's MLP: c_fc.weight and c_proj.weight are (G, b, n), rows being hidden units, so c_proj is stored transposed.
    """

    def __init__(self, config: Any):
        cl, n = config.cl, config.n_embd
        super().__init__(n, cl["blocks"] - cl["shared"], cl["active"], cl["held"], cl["join"])
        self.shared, self.backend = cl["shared"], cl["backend"]
        self.c_fc = Blocks(cl["blocks"], cl["block"], n)
        self.c_proj = Blocks(cl["blocks"], cl["block"], n)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, n), normalised -> (B, T, n)."""
        decision, cut = self.decided(), [self.shared, self.routed]
        (fc, fc_routed), (proj, proj_routed) = (m.weight.to(x.dtype).split(cut) for m in (self.c_fc, self.c_proj))
        return relu2(x @ fc.flatten(0, 1).mT) @ proj.flatten(0, 1) + BACKENDS[self.backend](x, fc_routed, proj_routed, decision)


class HeadProjection(Routed):
    """
    In the place of attention's c_proj: the output of a head that was not chosen is multiplied by 0 before it is projected, so that all
    that is the head's own gets a gradient of exactly 0. weight (H, D, n), rows being head dimensions, so it is stored transposed.
    """

    def __init__(self, config: Any):
        cl, self_heads = config.cl, config.n_head - config.cl["shared_heads"]
        super().__init__(config.n_embd, self_heads, cl["active_heads"])
        self.shared = cl["shared_heads"]
        self.weight = nn.Parameter(torch.empty(config.n_head, config.n_embd // config.n_head, config.n_embd))

    def forward(self, y: Tensor) -> Tensor:
        """y (B, T, n), the heads side by side -> (B, T, n)."""
        gate = spread(self.decided(), self.routed)                                     # (B, T, R)
        gate = F.pad(gate, (self.shared, 0), value=1.0).to(y.dtype)
        heads = y.unflatten(-1, self.weight.shape[:2]) * gate.unsqueeze(-1)
        return heads.flatten(-2) @ self.weight.to(y.dtype).flatten(0, 1)


def by_head(attention: nn.Module, config: Any) -> nn.Module:
    """nanochat's CausalSelfAttention, its matrices stored head by head: c_q (H, D, n), c_k and c_v (K, D, n), ve_gate (K, 1, 12)."""
    width = config.n_embd // config.n_head
    attention.c_q = Blocks(config.n_head, width, config.n_embd)
    attention.c_k, attention.c_v = (Blocks(config.n_kv_head, width, config.n_embd) for _ in range(2))
    attention.c_proj = HeadProjection(config)
    if attention.ve_gate is not None:
        attention.ve_gate = Blocks(config.n_kv_head, 1, attention.ve_gate.weight.shape[1])
    return attention


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def spread(decision: Decision, routed: int) -> Tensor:
    """The gate of each of the `routed` blocks at each position, 0 where it wasn't chosen: (B, T, R)."""
    # A sum with one term each; scatter's gradient is an indexed load, which torch 2.11 can't compile for every CPU.
    chosen = decision.choice[..., None] == torch.arange(routed, device=decision.choice.device)        # (B, S, k, R)
    gate = torch.where(chosen, decision.gate[..., None], 0).sum(-2)
    if max(decision.lengths) == 1:
        return gate
    return torch.cat([gate[:, i:i + 1].expand(-1, length, -1) for i, length in enumerate(decision.lengths)], dim=1)


# --- backends: x (B, T, n), fc and proj (R, b, n) -> (B, T, n) --------------------------------------------------------

def masked(x: Tensor, fc: Tensor, proj: Tensor, decision: Decision) -> Tensor:
    """The reference: every block computes, and the gate of a block that wasn't chosen is 0."""
    gate = spread(decision, fc.shape[0])
    hidden = relu2(x @ fc.flatten(0, 1).mT).unflatten(-1, fc.shape[:2]) * gate.to(x.dtype).unsqueeze(-1)
    return hidden.flatten(-2) @ proj.flatten(0, 1)


def not_before(grad: Tensor, choice: Tensor) -> Tensor:
    """`choice`, but computed from the gradient, if only by adding 0: so no compiler copies blocks by it in the forward and keeps them."""
    return choice + grad.flatten()[:1].isnan().long().clamp(max=0)


class Chosen(torch.autograd.Function):
    """
    x of M chunks by the blocks of weight (R, b, n) that choice (M, k) names: up, (M, t, n) -> (M, t, k*b), or down. The gradient of the
    weight is one small matmul with a one-hot matrix: a sum in a fixed order, exactly 0 where nothing was chosen (indexing's own gradient
    adds atomically on GPUs and slowly on CPUs).
    """
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, choice: Tensor, up: bool) -> Tensor:
        ctx.save_for_backward(x, weight, choice)
        ctx.up = up
        own = weight[choice].flatten(1, 2)
        return x @ (own.mT if up else own)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, choice = ctx.saved_tensors
        if grad.device.type in COPY_AGAIN:
            choice = not_before(grad, choice)
        own = weight[choice].flatten(1, 2)
        change = grad.mT @ x if ctx.up else x.mT @ grad                             # (M, k*b, n)
        one_hot = (choice.flatten()[:, None] == torch.arange(len(weight), device=grad.device)).to(grad.dtype)   # (M*k, R)
        return grad @ (own if ctx.up else own.mT), (one_hot.mT @ change.reshape(len(one_hot), -1)).view(weight.shape), None, None


def bmm(x: Tensor, fc: Tensor, proj: Tensor, decision: Decision, short: int = 0) -> Tensor:
    """Copy each chunk's blocks together and multiply in batches, one per run of chunks of equal length; those below `short` are masked."""
    out, chunk, position = [], 0, 0
    alike = [length if length >= short else 0 for length in decision.lengths]                         # 0: masked
    for length, run in groupby(alike):
        at = slice(chunk, chunk + len(list(run)))
        lengths = decision.lengths[at]
        here = x[:, position:position + sum(lengths)]
        choice, gate = decision.choice[:, at], decision.gate[:, at]
        if length:
            choice, gate = choice.flatten(0, 1), gate.flatten(0, 1).to(x.dtype)[:, None, :, None]     # (M, k), (M, 1, k, 1)
            hidden = relu2(Chosen.apply(here.reshape(len(choice), length, -1), fc, choice, True)).unflatten(-1, (-1, fc.shape[1])) * gate
            out.append(Chosen.apply(hidden.flatten(-2), proj, choice, False).view(here.shape))
        else:
            out.append(masked(here, fc, proj, Decision(choice, gate, lengths)))
        chunk, position = at.stop, position + sum(lengths)
    return torch.cat(out, dim=1)


def one_choice(x: Tensor, fc: Tensor, proj: Tensor, decision: Decision) -> Tensor:
    """Where all chunks of all rows chose the same blocks, in the same order, as in decoding: an ordinary MLP of these. Else ValueError."""
    if not torch.compiler.is_compiling() and not (decision.choice == decision.choice[:1, :1]).all():
        raise ValueError("the backend slice needs one choice for all chunks; these chose differently: use auto, bmm or masked")
    choice = decision.choice[0, 0]
    own = torch.arange(len(choice), device=x.device).expand_as(decision.choice)
    return masked(x, fc[choice], proj[choice], decision._replace(choice=own))


def auto(x: Tensor, fc: Tensor, proj: Tensor, decision: Decision) -> Tensor:
    """One choice where there is one chunk; else short chunks masked, the others by bmm."""
    one = decision.choice.shape[0] * decision.choice.shape[1] == 1
    return one_choice(x, fc, proj, decision) if one else bmm(x, fc, proj, decision, SHORT)


BACKENDS = {"auto": auto, "masked": masked, "bmm": bmm, "slice": one_choice}
