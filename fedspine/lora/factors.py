"""Which of the two LoRA factors is trained, sent and averaged: the configuration key `trained_factors`.

`b`: FFA-LoRA (arXiv 2403.12313). A stays what it was at the start, for ever; a device draws it again from the run's
seed, so that it is never sent. `alternate`: RoLoRA (arXiv 2502.01755). Odd rounds train B with A fixed, even rounds A
with B fixed; both are sent to a device, the trained one comes back. While one factor is the same on all devices, the
average of the other gives the exact average of the products; averaging both (FedIT) does not.
"""

from __future__ import annotations

from fedspine.lora.adapters import HEAD, narrow, rank_of
from fedspine.structure import ModelShape, Structure
from fedspine.types import Array, Arrays

BOTH = "AB"


def trained_sides(choice: str, round: int) -> str:
    """The factors that are trained, uploaded and averaged in a round (counted from 1): A, B, or AB."""
    if choice == "alternate":
        return "B" if round % 2 else "A"
    return sent_sides(choice)


def sent_sides(choice: str) -> str:
    """The factors that a device is sent: it knows the others."""
    return "B" if choice == "b" else BOTH


def of_sides(arrays: Arrays, sides: str) -> dict[str, Array]:
    """The head, and of every adapter the factors named."""
    return {name: array for name, array in arrays.items() if name.startswith(HEAD) or name[-1] in sides}


def completed(arrays: Arrays, known: Arrays, structure: Structure, shape: ModelShape) -> Arrays:
    """A device's arrays (narrow) with the factors that were not sent, from `known` in full coordinates."""
    if all(f"{shape.modules[0].name}.{side}" in arrays for side in BOTH):
        return arrays
    return narrow(known, structure, rank_of(arrays, shape), shape) | dict(arrays)


def restored(joined: Arrays, current: Arrays, sides: str) -> dict[str, Array]:
    """New global adapters after aggregation, with the fixed factors as they were, to the last bit."""
    return {**current, **of_sides(joined, sides)}
