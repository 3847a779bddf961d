"""FedSA-LoRA (arXiv 2410.01463): devices share A; B and the task head never leave them (`trained_factors = local-b`).

A device trains both factors and the head, uploads A, and goes on with the averaged A and its own B and head. Here the
server's process keeps these for it: they travel with requests and replies, and are not counted as traffic. At the end
every device is evaluated with what is its own, and one that never took part with B as zero and an untrained head. The
accuracy of the global model, which no device sees, is that of the averaged A with the mean B and the mean head of the
round's devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedspine.aggregation import zero_pad
from fedspine.aggregation.update import Update
from fedspine.lora.adapters import narrow
from fedspine.lora.factors import LOCAL_B, shared
from fedspine.structure import ModelShape, Structure
from fedspine.types import Array, Arrays


def kept_by_devices(
    choice: str, current: Arrays, devices: Sequence[int], updates: Sequence[Update], shape: ModelShape
) -> dict[int, Arrays]:
    """What the devices of a round keep to themselves, in full coordinates at the rank of `current`."""
    if choice != LOCAL_B:
        return {}
    whole = {
        device: zero_pad.aggregate(current, [update], shape) for device, update in zip(devices, updates, strict=True)
    }
    return {device: _without_shared(arrays) for device, arrays in whole.items()}


def own_part(
    local: Mapping[int, Arrays], device: int, current: Arrays, structure: Structure, rank: int, shape: ModelShape
) -> dict[str, Array]:
    """What a device has of its own (narrow); empty where it has nothing yet."""
    if device not in local:
        return {}
    return _without_shared(narrow({**current, **local[device]}, structure, rank, shape))


def _without_shared(arrays: Arrays) -> dict[str, Array]:
    gone = shared(arrays, LOCAL_B)
    return {name: array for name, array in arrays.items() if name not in gone}
