"""Zero-padding of the factors to full coordinates and the server's rank, then a plain weighted average.

The rule of the FedIT and HetLoRA family (arXiv 2401.06432): rows that few devices keep are diluted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine.aggregation.update import Update, mean_heads
from fedspine.lora.adapters import widen
from fedspine.structure import ModelShape
from fedspine.types import Array, Arrays


def aggregate(current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters at the rank of `current`; what nobody keeps becomes zero."""
    total = sum(update.weight for update in updates)
    result = {name: np.zeros_like(array) for name, array in current.items()}
    for update in updates:
        for name, array in widen(update.arrays, update.structure, shape).items():
            index = tuple(slice(size) for size in array.shape)
            result[name][index] += np.float32(update.weight / total) * array
    return result | mean_heads(current, updates)
