"""
LoRA (Hu et al. 2021), the control in which Phase B moves no weight of Phase A: beside each matrix of attention and MLP one of rank r.

    y = W x + SCALE / r * B A x,   W (out, in) frozen, A (r, in) random, B (out, r) zero: at first the function is Phase A's

Weights keep their names, all else is frozen too. The ledger counts dense's FLOPs: too many, for LoRA needs no gradient of W.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_cl.seeds import seed_for

MATRICES = {"attn": ("c_q", "c_k", "c_v", "c_proj"), "mlp": ("c_fc", "c_proj")}
SCALE = 16.0  # "alpha" of the paper
GROUP = {"kind": "adamw", "lr": 1e-3, "initial_lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}  # at lr_mult 1


class Adapted(nn.Module):
    """A bias-free linear map, frozen, with its adapter."""
    def __init__(self, linear: nn.Module, rank: int, generator: torch.Generator):
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        out, wide = self.weight.shape
        a = torch.rand(rank, wide, generator=generator).mul_(2).sub_(1).mul_(wide ** -0.5)  # as nn.Linear begins
        self.lora_a, self.lora_b = nn.Parameter(a.to(self.weight)), nn.Parameter(self.weight.new_zeros(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return F.linear(x, self.weight.to(x.dtype)) + SCALE / len(self.lora_a) * low


def adapt(model: nn.Module, rank: int, seed: int) -> torch.optim.Optimizer:
    """Freeze a dense model, put an adapter beside each of its MATRICES, and return nanochat's optimizer over the adapters alone."""
    from nanochat.optim import MuonAdamW
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed_for(seed, "lora"))
    for block in model.transformer.h:
        for part, names in MATRICES.items():
            for name in names:
                setattr(owner := getattr(block, part), name, Adapted(getattr(owner, name), rank, generator))
    return MuonAdamW([{**GROUP, "params": [p for p in model.parameters() if p.requires_grad]}])


@torch.no_grad()
def merged(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors of a model, each adapter folded into its weight: what plain nanochat loads. A model without adapters keeps its own."""
    folded = {f"{name}.weight": m.weight + SCALE / len(m.lora_a) * m.lora_b @ m.lora_a for name, m in model.named_modules()
              if isinstance(m, Adapted)}
    return {name: folded.get(name, tensor) for name, tensor in tensors.items() if not name.endswith(("lora_a", "lora_b"))}
