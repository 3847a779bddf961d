"""HetLoRA (arXiv 2401.06432): zero-padding, every device weighted by the norm of what its adapters do.

The weight is S_i = sqrt(sum of ||B_i A_i||_F^2 over the projections), so that devices of low rank, whose product is
small, weigh less. The task head is averaged by examples, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedspine.aggregation import zero_pad
from fedspine.aggregation.update import Update, mean_heads
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


def product_norm(arrays: Arrays, shape: ModelShape) -> float:
    """Frobenius norm of all B A of a device, by the trace trick sum((B^T B) * (A A^T)): no product is formed."""
    total = 0.0
    for module in shape.modules:
        a, b = (arrays[f"{module.name}.{side}"].astype(np.float64) for side in "AB")
        total += float(np.sum((b.T @ b) * (a @ a.T)))
    return math.sqrt(max(total, 0.0))
