"""Aggregation in product space: average what the adapters do, not their factors.

Every device's update of a module is the change of its product, B_i A_i minus the slice of the global product that it
started from. Rows (or columns) are averaged over the devices that keep them, so a structure that few devices keep is
not diluted; components beyond a device's rank, and rows that nobody kept, stay as they were. The sum is brought back
to the server's rank by a truncated SVD, whose components are ordered, so that a device of lower rank gets the best
ones. With equal full ranks and no cuts this is FlexLoRA (arXiv 2402.11505). A cut touches only one side of a matrix,
so the contributor division is a scaling of one factor, and QR of the joined factors replaces the dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedspine.aggregation.update import Update, contributor_mass, mean_heads
from fedspine.lora.adapters import kept_features
from fedspine.structure import ModelShape, ModuleShape
from fedspine.types import Array, Arrays


def aggregate(current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters at the rank of `current` [rank]; updates in device order."""
    result = mean_heads(current, updates)
    for module in shape.modules:
        b, a = _module_sum(current, updates, module, shape)
        rank = len(current[f"{module.name}.A"])
        result[f"{module.name}.B"], result[f"{module.name}.A"] = truncate(b, a, rank)
    return result


def average(past: Arrays, new: Arrays, decay: float, shape: ModelShape) -> dict[str, Array]:
    """decay * past + (1 - decay) * new of every product and of the head, at the same rank."""
    result = {
        name: (decay * past[name] + (1.0 - decay) * new[name]).astype(np.float32)
        for name in new
        if name.startswith("head.")
    }
    for module in shape.modules:
        names = f"{module.name}.B", f"{module.name}.A"
        b = np.concatenate([decay * past[names[0]], (1.0 - decay) * new[names[0]]], axis=1)
        a = np.concatenate([past[names[1]], new[names[1]]], axis=0)
        rank = len(new[names[1]])
        result[names[0]], result[names[1]] = truncate(b, a, rank)
    return result


def truncate(b: Array, a: Array, rank: int) -> tuple[Array, Array]:
    """Best approximation of b @ a of the given rank, as balanced factors (B [d_out, rank], A [rank, d_in]).

    SVD of the small core between the QR factors: no d_out x d_in matrix is formed.
    """
    q_b, r_b = torch.linalg.qr(torch.from_numpy(np.ascontiguousarray(b, dtype=np.float32)))
    q_a, r_a = torch.linalg.qr(torch.from_numpy(np.ascontiguousarray(a.T, dtype=np.float32)))
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    new_b = torch.zeros(b.shape[0], rank)
    new_a = torch.zeros(rank, a.shape[1])
    new_b[:, :kept] = q_b @ (u[:, :kept] * root)
    new_a[:kept] = (root[:, None] * vh[:kept]) @ q_a.T
    return new_b.numpy(), new_a.numpy()


def _module_sum(
    current: Arrays, updates: Sequence[Update], module: ModuleShape, shape: ModelShape
) -> tuple[Array, Array]:
    """Joined factors (b [d_out, R], a [R, d_in]) of the global product plus the averaged changes."""
    rows = module.axis == "rows"
    b0, a0 = current[f"{module.name}.B"], current[f"{module.name}.A"]
    cut_side = b0 if rows else a0.T
    mass = contributor_mass(updates, module, shape)
    share_gone = np.zeros(cut_side.shape, dtype=np.float32)
    parts_cut, parts_other = [], []
    for update in updates:
        kept = kept_features(module, update.structure, shape)
        scale = (update.weight / mass[kept]).astype(np.float32)
        b, a = update.arrays[f"{module.name}.B"], update.arrays[f"{module.name}.A"]
        rank = len(a)
        full = np.zeros((len(mass), rank), dtype=np.float32)
        full[kept] = (b if rows else a.T) * scale[:, None]
        share_gone[kept, :rank] += scale[:, None]
        parts_cut.append(full)
        parts_other.append(a if rows else b.T)
    parts_cut.insert(0, cut_side * (1.0 - share_gone))
    parts_other.insert(0, a0 if rows else b0.T)
    joined_cut, joined_other = np.concatenate(parts_cut, axis=1), np.concatenate(parts_other, axis=0)
    return (joined_cut, joined_other) if rows else (joined_other.T, joined_cut.T)
