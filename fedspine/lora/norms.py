"""Frobenius norms of what adapters do, by the trace trick ||B A||^2 = sum((B^T B) * (A A^T)): no product is formed."""

from __future__ import annotations

import math

import numpy as np
import torch

from fedspine.structure import ModelShape
from fedspine.types import Arrays


def product_norm(arrays: Arrays, shape: ModelShape) -> float:
    """Of all B A of a device together; its arrays may be float32, the sums are float64."""
    total = 0.0
    for module in shape.modules:
        b, a = (torch.from_numpy(np.asarray(arrays[f"{module.name}.{side}"])).double() for side in "BA")
        total += float(torch.sum((b.T @ b) * (a @ a.T)))
    return math.sqrt(max(total, 0.0))


def update_norm(before: Arrays, after: Arrays, shape: ModelShape, scale: float) -> float:
    """Of the change of all s B A, whose factors are the joined ones of both. Both on the same structure."""
    change = {}
    for module in shape.modules:
        name = module.name
        change[f"{name}.B"] = np.concatenate([after[f"{name}.B"], -before[f"{name}.B"]], axis=1)
        change[f"{name}.A"] = np.concatenate([after[f"{name}.A"], before[f"{name}.A"]])
    return scale * product_norm(change, shape)
