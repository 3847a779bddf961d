"""Attention of encoders in bfloat16 on a CPU, as one function with its own gradient.

Short rows make attention a matter of passes over small matrices: torch's softmax of bfloat16 rows whose length is no
multiple of 32 takes longer than the products around it, and its fused attention has a slow backward pass there. Here
the softmax works in float32, in place, between products in bfloat16. `benchmarks/NOTES.md` has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "fedspine_encoder"
"""For `set_attn_implementation` of a transformers model, once this module is imported."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T s + mask) v of [rows, heads, tokens, features], as [rows, tokens, heads, features]; no dropout."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, attention_mask, scaling), None  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        scores = (query @ key.mT).float().mul_(scale)
        if mask is not None:
            scores.add_(mask)
        weights = torch.softmax(scores, -1).to(query.dtype)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return (weights @ value).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        gradient = gradients[0].transpose(1, 2)
        of_weights = (gradient @ value.mT).float()
        of_scores = torch._softmax_backward_data(of_weights, weights.float(), -1, torch.float32)
        of_scores = of_scores.mul_(ctx.scale).to(query.dtype)
        return of_scores @ key, of_scores.mT @ query, weights.mT @ gradient, None, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)
