"""LoRA-FAIR (arXiv 2411.14961): averages of the factors, and B corrected so that the product fits the average product.

With the means A and B of FedIT and the average of the products dW, the correction minimises
||dW - (B + dB) A||_F^2 + lambda ||dB||_F^2: dB = (dW - B A) A^T (A A^T + lambda I)^-1. The paper has a cosine
similarity in place of the first term and takes gradient steps; the closed form is our reading of it. Rows and columns
are averaged over the devices that keep them, ranks below the server's are padded with zeros, as in `coordinate`. What
nobody keeps stays as it was and weighs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine.aggregation import coordinate
from fedspine.aggregation.update import Update, contributor_mass
from fedspine.lora.adapters import kept_features
from fedspine.structure import ModelShape, ModuleShape
from fedspine.types import Array, Arrays

LAMBDA = 0.01
"""Weight of the correction's own size (the paper's value)."""


def aggregate(current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters; rows and columns that no device keeps stay as they were."""
    result = coordinate.aggregate(current, updates, shape)
    for module in shape.modules:
        a_name, b_name = f"{module.name}.A", f"{module.name}.B"
        result[b_name] = (result[b_name] + _correction(result[a_name], result[b_name], updates, module)).astype(
            np.float32
        )
    return result


def _correction(mean_a: Array, mean_b: Array, updates: Sequence[Update], module: ModuleShape) -> Array:
    """dB [d_out, rank]. The product of a device meets A^T factor by factor, so that no dense matrix is formed."""
    mass = contributor_mass(updates, module)
    a, b = mean_a.astype(np.float64), mean_b.astype(np.float64)
    rows = module.axis == "rows"
    if not rows:
        a[:, mass == 0] = 0.0
    gram = a @ a.T
    residual = -b @ gram
    if rows:
        residual[mass == 0] = 0.0
    for update in updates:
        kept = kept_features(module, update.structure)
        share = update.weight / mass[kept]
        own_a, own_b = (update.arrays[f"{module.name}.{side}"].astype(np.float64) for side in "AB")
        if rows:
            residual[kept] += share[:, None] * (own_b @ (own_a @ a.T))
        else:
            residual += own_b @ ((own_a * share) @ a[:, kept].T)
    return np.linalg.solve(gram + LAMBDA * np.eye(len(gram)), residual.T).T
