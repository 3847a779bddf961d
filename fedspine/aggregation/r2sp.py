"""R2SP of FedMP (doi 10.1109/ICDE53745.2022.00062): recover every device's submodel, then average.

A device's model is completed with the residual, the global values of all that it has not: rows and columns that it has
cut, components beyond its rank. The completed models are averaged by examples. Against `coordinate`, what few devices
keep moves by their share only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine.aggregation.update import Update, mean_heads
from fedspine.lora.adapters import kept_features
from fedspine.structure import ModelShape
from fedspine.types import Array, Arrays


def aggregate(current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters at the rank of `current`; what nobody keeps stays as it was."""
    result = {name: array.copy() for name, array in current.items()}
    total = sum(update.weight for update in updates)
    for update in updates:
        share = np.float32(update.weight / total)
        for module in shape.modules:
            a_name, b_name = f"{module.name}.A", f"{module.name}.B"
            a, b = update.arrays[a_name], update.arrays[b_name]
            kept = kept_features(module, update.structure)
            every = np.arange(module.d_in if module.axis == "rows" else module.d_out)
            columns, rows = (every, kept) if module.axis == "rows" else (kept, every)
            here_a, here_b = np.ix_(np.arange(len(a)), columns), np.ix_(rows, np.arange(b.shape[1]))
            result[a_name][here_a] += share * (a - current[a_name][here_a])
            result[b_name][here_b] += share * (b - current[b_name][here_b])
    return result | mean_heads(current, updates)
