"""Adapters as plain arrays: how they start, and how they move between ranks and structures.

Names: `<module>.A` [rank, d_in], `<module>.B` [d_out, rank], `head.<parameter>` (`head.<module>.<parameter>` where a
head is several modules); `<module>.W` [d_out, d_in] where something was folded into the frozen weight. Full coordinates
mean the uncut base model's rows and columns at the server's rank; narrow means one device's rank and kept structures.
The scale alpha/rank is the same at every rank, so it never has to be folded in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedspine.structure import ModelShape, ModuleShape, Structure
from fedspine.types import Array, Arrays

HEAD = "head."

Value = TypeVar("Value")


def start_adapters(shape: ModelShape, rank: int, rng: np.random.Generator) -> dict[str, Array]:
    """A uniform in +-1/sqrt(d_in) (Kaiming, as PEFT), B zero: the function of the base model is unchanged."""
    arrays: dict[str, Array] = {}
    for module in shape.modules:
        bound = 1.0 / np.sqrt(module.d_in)
        arrays[f"{module.name}.A"] = rng.uniform(-bound, bound, (rank, module.d_in)).astype(np.float32)
        arrays[f"{module.name}.B"] = np.zeros((module.d_out, rank), dtype=np.float32)
    return arrays


def kept_features(module: ModuleShape, structure: Structure) -> NDArray[np.int64]:
    """Indices of the rows (or columns) of a module that a structure keeps."""
    return np.flatnonzero(module.features(structure.mask(module.layer, module.unit)))


def narrow(arrays: Arrays, structure: Structure, rank: int | tuple[int, ...], shape: ModelShape) -> dict[str, Array]:
    """Full coordinates to one device's structure and its first `rank` components: of all projections, or of each."""
    result = {name: array for name, array in arrays.items() if name.startswith(HEAD)}
    for index, module in enumerate(shape.modules):
        first = rank if isinstance(rank, int) else rank[index]
        kept = kept_features(module, structure)
        a, b = arrays[f"{module.name}.A"][:first], arrays[f"{module.name}.B"][:, :first]
        if module.axis == "rows":
            b = b[kept]
        else:
            a = a[:, kept]
        result[f"{module.name}.A"] = np.ascontiguousarray(a)
        result[f"{module.name}.B"] = np.ascontiguousarray(b)
        if (folded := arrays.get(f"{module.name}.W")) is not None:
            result[f"{module.name}.W"] = np.take(folded, kept, axis=0 if module.axis == "rows" else 1)
    return result


def widen(arrays: Arrays, structure: Structure, shape: ModelShape) -> dict[str, Array]:
    """One device's adapters to full coordinates at their own ranks, and the head; what is cut is zero."""
    result = {name: array for name, array in arrays.items() if name.startswith(HEAD)}
    for module in shape.modules:
        kept = kept_features(module, structure)
        a, b = arrays[f"{module.name}.A"], arrays[f"{module.name}.B"]
        rank = len(a)
        if module.axis == "rows":
            full = np.zeros((module.d_out, rank), dtype=np.float32)
            full[kept] = b
            b = full
        else:
            full = np.zeros((rank, module.d_in), dtype=np.float32)
            full[:, kept] = a
            a = full
        result[f"{module.name}.A"], result[f"{module.name}.B"] = a, b
    return result


def above(values: Mapping[str, Value], first_layer: int, shape: ModelShape) -> dict[str, Value]:
    """By wire name, without the adapters of the layers below `first_layer`."""
    below = {f"{module.name}.{side}" for module in shape.modules if module.layer < first_layer for side in "AB"}
    return {name: value for name, value in values.items() if name not in below}


def ranks_of(arrays: Arrays, shape: ModelShape) -> tuple[int, ...]:
    """Of a device's adapters, projection by projection; one factor is enough, and without any it is 0."""
    pairs = [(arrays.get(f"{module.name}.A"), arrays.get(f"{module.name}.B")) for module in shape.modules]
    return tuple(len(a) if a is not None else 0 if b is None else b.shape[1] for a, b in pairs)


def rank_of(arrays: Arrays, shape: ModelShape) -> int:
    """The largest of them."""
    return max(ranks_of(arrays, shape))


def nbytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
