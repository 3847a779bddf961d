"""The LoRA layer: PEFT's, with the product of a projection and its adapters as one function with its own gradient.

The rank-sized factors meet wide activations in four products per step and projection. Which operand is transposed
decides how fast such a thin product is on a CPU, up to five times, and adding in place saves a wide copy: both are
chosen here and cannot be expressed through autograd. `benchmarks/NOTES.md` has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional

ADAPTER = "default"


def with_fused_lora(settings: LoraConfig) -> LoraConfig:
    """The same settings with `FusedLinear` wherever PEFT would put its own layer around a linear one."""
    settings._register_custom_module({nn.Linear: FusedLinear})  # PEFT's documented way to bring one's own layer
    return settings


class FusedLinear(Linear):  # type: ignore[misc]
    """x W^T + b + s (x A^T) B^T without dropout. The factors are float32; the arithmetic is in the type of x.

    Factors with one dimension more, in front, are those of several devices: x holds as many equal parts.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.base_layer
        if self.disable_adapters:
            return base(x)  # type: ignore[no-any-return]
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return _Product.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, base.weight, base.bias, a, b, self.scaling[ADAPTER]
        )


class _Product(torch.autograd.Function):
    """[..., d_in] to [..., d_out]; gradients for x, A and B, none for the frozen weight and bias.

    Thin matrices are kept as [rank, tokens].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        parts = x.reshape(*a.shape[:-2], -1, x.shape[-1])
        thin = (a @ parts.mT).mul_(scale)
        result = functional.linear(x.flatten(0, -2), weight, bias)
        _add_product(result.view(*parts.shape[:-1], -1), thin.mT, b.mT)
        ctx.save_for_backward(parts, weight, a, b, thin)
        ctx.scale = scale
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts, weight, a, b, thin = ctx.saved_tensors
        (gradient,) = gradients
        wide = gradient.reshape(*parts.shape[:-1], -1)
        thin_gradient = (b.mT @ wide.mT).mul_(ctx.scale)
        of_a = (thin_gradient @ parts).float() if ctx.needs_input_grad[3] else None
        of_b = (thin @ wide).mT.float() if ctx.needs_input_grad[4] else None
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = wide.flatten(0, -2) @ weight
            _add_product(of_x.view_as(parts), thin_gradient.mT, a)
            of_x = of_x.view(*gradient.shape[:-1], -1)
        return of_x, None, None, of_a, of_b, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """In place, for matrices or stacks of them."""
    total.addmm_(left, right) if total.ndim == 2 else total.baddbmm_(left, right)
