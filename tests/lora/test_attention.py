"""Attention of our own against torch's, in float32, where both are exact."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fedspine.lora.attention import attention


@pytest.mark.parametrize("masked", [True, False])
def test_attention_and_its_gradients_are_torchs(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 2, 5, 4, generator=generator, requires_grad=True) for _ in range(3)]
    hidden = torch.zeros(3, 1, 1, 5).masked_fill(torch.arange(5) > 2, torch.finfo(torch.float32).min)
    mask = hidden if masked else None
    weight = torch.randn(3, 5, 2, 4, generator=generator)
    found = []
    for output in (
        attention(torch.nn.Identity(), *inputs, mask, scaling=0.7)[0],
        scaled_dot_product_attention(*inputs, mask, scale=0.7).transpose(1, 2),
    ):
        found.append((output, *torch.autograd.grad((output * weight).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
