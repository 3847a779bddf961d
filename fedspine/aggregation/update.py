"""What every aggregation rule works on, and the parts that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedspine.lora.adapters import HEAD, kept_features
from fedspine.structure import ModuleShape, Structure
from fedspine.types import Array, Arrays


@dataclass(frozen=True)
class Update:
    """One device's reply, as aggregation sees it."""

    weight: float
    """Its share before normalisation: the number of its training examples."""
    structure: Structure
    arrays: Arrays
    """Adapters at the device's rank and structure, and the head."""
    first_layer: int = 0
    """The lowest whose adapters it has trained; those below are the server's own."""


def mean_heads(current: Arrays, updates: Sequence[Update]) -> dict[str, Array]:
    """Example-weighted mean of the task heads: every method aggregates the head in the same way."""
    total = sum(update.weight for update in updates)
    return {
        name: np.sum([update.weight / total * update.arrays[name] for update in updates], axis=0, dtype=np.float32)
        for name in current
        if name.startswith(HEAD)
    }


def contributor_mass(updates: Sequence[Update], module: ModuleShape) -> NDArray[np.float64]:
    """Summed weight of the devices that keep each row (or column) of a module."""
    features = module.d_out if module.axis == "rows" else module.d_in
    mass = np.zeros(features)
    for update in updates:
        mass[kept_features(module, update.structure)] += update.weight
    return mass
