"""HetLoRA (arXiv 2401.06432): zero-padding, every device weighted by the norm of what its adapters do.

The weight is S_i = sqrt(sum of ||B_i A_i||_F^2 over the projections), so that devices of low rank, whose product is
small, weigh less. The task head is averaged by examples, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedspine.aggregation import zero_pad
from fedspine.aggregation.update import Update, mean_heads
from fedspine.lora.norms import product_norm
from fedspine.structure import ModelShape
from fedspine.types import Array, Arrays


def aggregate(current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters at the rank of `current`; what nobody keeps becomes zero."""
    norms = [product_norm(update.arrays, shape) for update in updates]
    if any(norms):
        weighted = [replace(update, weight=norm) for update, norm in zip(updates, norms, strict=True)]
    else:  # nobody has moved B yet
        weighted = list(updates)
    return zero_pad.aggregate(current, weighted, shape) | mean_heads(current, updates)
