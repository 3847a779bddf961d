"""FlexLoRA's aggregation: the weighted mean of the devices' products, brought back to the server's rank by an SVD.

What the server had before is forgotten, also what lies beyond the rank of every device: `product` averages changes and
keeps that. Source: FlexLoRA (arXiv 2402.11505), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine.aggregation import product
from fedspine.aggregation.update import Update
from fedspine.structure import ModelShape
from fedspine.types import Array, Arrays


def aggregate(current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters at the rank of `current` [rank]; updates in device order. A row nobody kept becomes 0."""
    factors = {f"{module.name}.{side}" for module in shape.modules for side in "AB"}
    nothing = {name: np.zeros_like(array) if name in factors else array for name, array in current.items()}
    return product.aggregate(nothing, updates, shape)
