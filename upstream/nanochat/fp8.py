"""
Tensorwise dynamic FP8 for linear layers (Micikevicius et al. 2022, arXiv 2209.05433): one scale per tensor from its largest
magnitude of this very step; activations and weights in e4m3, gradients in e5m2, sums in fp32. Meant for Hopper or newer.

M tokens, K input features, N output features; the hardware wants all three in multiples of 16.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.common import COMPUTE_DTYPE

EPS = 1e-12  # floor for the largest magnitude: a tensor of zeros gets a finite scale


@torch.no_grad()
def _to_fp8(x: Tensor, fp8_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in FP8, inverse scale (0-D fp32)): x is about x_fp8 * inverse scale, and its largest magnitude takes the largest FP8 value."""
    fp8_max = torch.finfo(fp8_dtype).max
    x = x.float()
    scale = (fp8_max / x.abs().max().double().clamp(min=EPS)).float()
    # Casting does not saturate: what rounding lifts above the largest value would become NaN.
    return (x * scale).clamp(-fp8_max, fp8_max).to(fp8_dtype), scale.reciprocal()


def _to_col_major(x: Tensor) -> Tensor:
    """The same matrix with its columns contiguous, as the right factor of _scaled_mm must be."""
    return x.t().contiguous().t()


@torch._dynamo.allow_in_graph
class _Float8Matmul(torch.autograd.Function):
    """input (M, K) @ weight (N, K).T -> (M, N), and both gradients, as three FP8 products."""

    @staticmethod
    def forward(ctx, input_2d: Tensor, weight: Tensor) -> Tensor:
        x, x_inv = _to_fp8(input_2d, torch.float8_e4m3fn)
        w, w_inv = _to_fp8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x, x_inv, w, w_inv)
        return torch._scaled_mm(x, w.t(), scale_a=x_inv, scale_b=w_inv, out_dtype=input_2d.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, x_inv, w, w_inv = ctx.saved_tensors
        g, g_inv = _to_fp8(grad_output, torch.float8_e5m2)
        # Gradients span more magnitudes than activations: exact accumulation.
        exact = {"out_dtype": grad_output.dtype, "use_fast_accum": False}
        grad_input = torch._scaled_mm(g.contiguous(), _to_col_major(w), scale_a=g_inv, scale_b=w_inv, **exact)
        grad_weight = torch._scaled_mm(g.t().contiguous(), _to_col_major(x), scale_a=g_inv, scale_b=x_inv, **exact)
        return grad_input, grad_weight


class Float8Linear(nn.Linear):
    """nn.Linear that multiplies in FP8. Its master weight keeps its dtype; the output has COMPUTE_DTYPE."""

    def forward(self, input: Tensor) -> Tensor:
        input = input.to(COMPUTE_DTYPE)
        output = _Float8Matmul.apply(input.reshape(-1, self.in_features), self.weight)
        output = output.reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    @classmethod
    def from_float(cls, mod: nn.Linear) -> "Float8Linear":
        """The FP8 layer around the very parameters of `mod`."""
        with torch.device("meta"):
            new = cls(mod.in_features, mod.out_features, bias=False)
        new.weight, new.bias = mod.weight, mod.bias
        return new.train(mod.training)


@dataclass(frozen=True)
class Float8LinearConfig:
    """How to scale. There is one way; the class keeps the call sites those of torchao."""

    @staticmethod
    def from_recipe_name(name: str) -> "Float8LinearConfig":
        if name != "tensorwise":
            raise ValueError(f"only the FP8 recipe 'tensorwise' is implemented, got {name!r}")
        return Float8LinearConfig()


def convert_to_float8_training(module: nn.Module, *, config: Float8LinearConfig | None = None,
                               module_filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """Replace each nn.Linear that passes filter(module, full name), children first, in place. Returns the module."""
    def convert(mod: nn.Module, name: str) -> nn.Module:
        for child_name, child in list(mod.named_children()):
            new = convert(child, f"{name}.{child_name}" if name else child_name)
            if new is not child:
                setattr(mod, child_name, new)
        wanted = isinstance(mod, nn.Linear) and not isinstance(mod, Float8Linear)
        return Float8Linear.from_float(mod) if wanted and (module_filter_fn is None or module_filter_fn(mod, name)) else mod
    return convert(module, "")
