"""Aggregation in product space: average what the adapters do, not their factors.

Every device's update of a module is the change of its product, B_i A_i minus the slice of the global product that it
started from. Rows (or columns) are averaged over the devices that keep them, so a structure that few devices keep is
not diluted; components beyond a device's rank, and rows that nobody kept, stay as they were. The sum is brought back
to the server's rank by a truncated SVD, whose components are ordered, so that a device of lower rank gets the best
ones. With equal full ranks and no cuts this is FlexLoRA (`flex`). A cut touches only one side of a matrix,
so the contributor division is a scaling of one factor, and QR of the joined factors replaces the dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedspine.aggregation.update import Update, mean_heads
from fedspine.lora.adapters import kept_features
from fedspine.structure import ModelShape, ModuleShape
from fedspine.types import Array, Arrays

DENSE_FROM = 8
"""A randomised SVD pays when both sides of a matrix are so many times the rank."""
OVERSAMPLING = 2
POWER_ITERATIONS = 2


def aggregate(current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters at the rank of `current` [rank]; updates in device order."""
    result = mean_heads(current, updates)
    for module in shape.modules:
        b, a = _module_sum(current, updates, module, shape)
        rank = len(current[f"{module.name}.A"])
        result[f"{module.name}.B"], result[f"{module.name}.A"] = truncate(b, a, rank)
    return result


def average(past: Arrays, new: Arrays, decay: float, shape: ModelShape) -> dict[str, Array]:
    """decay * past + (1 - decay) * new of every product, at the same rank, of the head and of what was folded."""
    result = {
        name: (decay * past[name] + (1.0 - decay) * new[name]).astype(np.float32)
        for name in new
        if name.startswith("head.") or name.endswith(".W")
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

    SVD of the small core between the QR factors. Of many joined factors that core would be as large as the product
    itself: then the product is formed, and a randomised SVD (always from the same seed) finds its leading components.
    """
    smaller = min(b.shape[0], a.shape[1])
    if len(a) > smaller > DENSE_FROM * rank:
        return _leading(b, a, rank)
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


def _leading(b: Array, a: Array, rank: int) -> tuple[Array, Array]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(
            torch.from_numpy(b) @ torch.from_numpy(a), q=OVERSAMPLING * rank, niter=POWER_ITERATIONS
        )
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).numpy(), (root[:, None] * v[:, :rank].T).numpy()


def _module_sum(
    current: Arrays, updates: Sequence[Update], module: ModuleShape, shape: ModelShape
) -> tuple[Array, Array]:
    """Joined factors (b [d_out, R], a [R, d_in]) of the global product plus the averaged changes."""
    rows = module.axis == "rows"
    b0, a0 = current[f"{module.name}.B"], current[f"{module.name}.A"]
    kept = [kept_features(module, update.structure) for update in updates]
    ends = np.cumsum([len(a0), *(len(update.arrays[f"{module.name}.A"]) for update in updates)])
    cut_side = np.zeros((module.d_out if rows else module.d_in, ends[-1]), dtype=np.float32)
    other = np.empty((ends[-1], module.d_in if rows else module.d_out), dtype=np.float32)
    mass = np.zeros(len(cut_side))
    for update, index in zip(updates, kept, strict=True):
        mass[index] += update.weight
    gone = np.zeros((len(cut_side), len(a0)), dtype=np.float32)
    for update, index, start, end in zip(updates, kept, ends[:-1], ends[1:], strict=True):
        scale = (update.weight / mass[index]).astype(np.float32)[:, None]
        b, a = update.arrays[f"{module.name}.B"], update.arrays[f"{module.name}.A"]
        cut_side[index, start:end] = (b if rows else a.T) * scale
        other[start:end] = a if rows else b.T
        gone[index, : end - start] += scale
    cut_side[:, : len(a0)] = (b0 if rows else a0.T) * (1.0 - gone)
    other[: len(a0)] = a0 if rows else b0.T
    return (cut_side, other) if rows else (other.T, cut_side.T)
