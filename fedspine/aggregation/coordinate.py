"""Averaging of the factors, each row and column over the devices that keep it.

With no cuts this is the plain weighted average of A and B (FedIT, arXiv 2305.05644). It normalises over coordinates
only, never over ranks: a device's missing components count as zero, because undiluted components of unequal ranks
over-count when the model is used at full rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine.aggregation.update import Update, contributor_mass, mean_heads
from fedspine.lora.adapters import kept_features
from fedspine.structure import ModelShape
from fedspine.types import Array, Arrays


def aggregate(current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters; rows and columns that no device keeps stay as they were."""
    result = mean_heads(current, updates)
    total = sum(update.weight for update in updates)
    for module in shape.modules:
        b_name, a_name = f"{module.name}.B", f"{module.name}.A"
        cut_name, other_name = (b_name, a_name) if module.axis == "rows" else (a_name, b_name)
        mass = contributor_mass(updates, module)
        cut = np.where((mass > 0)[:, None], 0.0, _side(current[cut_name], module.axis)).astype(np.float32)
        other = np.zeros_like(current[other_name])
        for update in updates:
            kept = kept_features(module, update.structure)
            part = _side(update.arrays[cut_name], module.axis)
            cut[kept, : part.shape[1]] += (update.weight / mass[kept]).astype(np.float32)[:, None] * part
            whole = update.arrays[other_name]
            rows, columns = whole.shape
            other[:rows, :columns] += np.float32(update.weight / total) * whole
        result[cut_name] = np.ascontiguousarray(_side(cut, module.axis))
        result[other_name] = other
    return result


def _side(array: Array, axis: str) -> Array:
    """The factor with cut features first: B as it is, A transposed."""
    return array if axis == "rows" else array.T
