"""Which of the two LoRA factors is trained, sent and averaged: the configuration key `trained_factors`.

`b`: FFA-LoRA (arXiv 2403.12313). A stays what it was at the start, for ever; a device draws it again from the run's
seed, so that it is never sent. `alternate`: RoLoRA (arXiv 2502.01755). Odd rounds train B with A fixed, even rounds A
with B fixed; both are sent to a device, the trained one comes back. While one factor is the same on all devices, the
average of the other gives the exact average of the products; averaging both (FedIT) does not. `local-b`: FedSA-LoRA
(arXiv 2410.01463). Both are trained, and A alone is sent and averaged (`aggregation/personal.py`).
"""

from __future__ import annotations

import numpy as np

from fedspine.config import RunConfig
from fedspine.lora.adapters import HEAD, narrow, rank_of, start_adapters
from fedspine.randomness import Purpose, generator
from fedspine.structure import ModelShape, Structure
from fedspine.types import Array, Arrays, TrainRequest

BOTH = "AB"
FOLDED = "W"
"""Of an array with what was folded into a frozen weight (`aggregation/fold.py`)."""
LOCAL_B = "local-b"


def trained_sides(choice: str, round: int) -> str:
    """The factors that are trained and come back in a round (counted from 1): A, B, or AB."""
    if choice == "alternate":
        return "B" if round % 2 else "A"
    return "B" if choice == "b" else BOTH


def sent(arrays: Arrays, config: RunConfig) -> dict[str, Array]:
    """What of the global arrays a device is sent: it knows, or draws, the other factors."""
    sides = "" if config.fold == "all" else "B" if config.trained_factors == "b" else BOTH
    return on_the_wire(shared(of_sides(arrays, sides + FOLDED), config.trained_factors), config)


def on_the_wire(arrays: Arrays, config: RunConfig) -> dict[str, Array]:
    """The same, with what travels rounded to the type in which it does.

    A device starts from the rounded values, so that the rounding is averaged as a part of its change.
    """
    travels = shared(arrays, config.trained_factors)
    return {**arrays, **{name: array.astype(config.wire_dtype, copy=False) for name, array in travels.items()}}


def off_the_wire(arrays: Arrays) -> dict[str, Array]:
    """In float32, in which they are trained and averaged."""
    return {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}


def shared(arrays: Arrays, choice: str) -> dict[str, Array]:
    """What of a device's arrays does not stay on it: all, or A alone."""
    return {
        name: array
        for name, array in arrays.items()
        if choice != LOCAL_B or (name.endswith(".A") and not name.startswith(HEAD))
    }


def of_sides(arrays: Arrays, sides: str) -> dict[str, Array]:
    """The head, and of every adapter the factors named."""
    return {name: array for name, array in arrays.items() if name.startswith(HEAD) or name[-1] in sides}


def known_to(request: TrainRequest, config: RunConfig, start: Arrays, shape: ModelShape) -> Arrays:
    """What a device has without being sent it: the start, or adapters that it draws for the round (FLoRA)."""
    if config.fold != "all":
        return start
    rng = generator(config.seed, request.round, request.device, Purpose.ADAPTERS)
    return start_adapters(shape, request.action.lora_rank, rng)


def completed(arrays: Arrays, known: Arrays, structure: Structure, shape: ModelShape) -> dict[str, Array]:
    """A device's arrays (narrow, float32) with what was not sent, from `known` in full coordinates."""
    arrays = off_the_wire(arrays)
    if all(f"{shape.modules[0].name}.{side}" in arrays for side in BOTH):
        return arrays
    rank = rank_of(arrays, shape) or rank_of(known, shape)
    return narrow(known, structure, rank, shape) | arrays


def restored(joined: Arrays, current: Arrays, sides: str) -> dict[str, Array]:
    """New global adapters after aggregation, with the fixed factors as they were, to the last bit."""
    return {**current, **of_sides(joined, sides)}
