"""Several devices as one batch over the same frozen weights.

The base is cut to the union of the devices' structures, and what a device has cut beyond that is masked. Its adapters,
padded with zeros to the largest rank, are one slice of stacked factors, so that a projection adds one batched product
for all devices. A zero row of A with a zero column of B gets no gradient, and neither does what a mask hides: padding
and cuts stay as they are, and every device gets what it would get alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fedspine.lora.adapters import HEAD, kept_features, narrow, rank_of, widen
from fedspine.lora.factors import BOTH
from fedspine.lora.resident import ResidentModel
from fedspine.structure import ModuleShape, Structure
from fedspine.types import Array, Arrays


class DeviceGroup:
    """Devices that are mounted side by side. A batch holds as many rows of each, device after device."""

    def __init__(
        self,
        resident: ResidentModel,
        structures: Sequence[Structure],
        arrays: Sequence[Arrays],
        trained: str = BOTH,
        first_layer: int = 0,
    ) -> None:
        """Mount devices with these structures and adapters (narrow). Call `close` before the next mount.

        `trained`: the factors that get gradients, A, B or AB. `first_layer`: the lowest whose adapters get any.
        """
        self.resident = resident
        self.structures = list(structures)
        shape = resident.shape
        self._ranks = [rank_of(each, shape) for each in arrays]
        union = _union(structures)
        stacked = _stacked([self._in(union, *pair) for pair in zip(structures, arrays, strict=True)])
        folded = {name: array for name, array in arrays[0].items() if name.endswith(".W")}  # of all: nobody is cut then
        resident.mount(union, stacked | folded, trained=trained, first_layer=first_layer)
        self._masks: dict[str, torch.Tensor | None] = {}
        """By projection: over the inputs of `o` and `down`."""
        self._handles: list[RemovableHandle] = []
        for projection in resident.projections:
            if projection.axis == "columns":
                module = resident.model.get_submodule(projection.name)
                self._handles.append(module.register_forward_pre_hook(self._hide(projection)))
        self._set_masks()

    def __len__(self) -> int:
        return len(self.structures)

    def cut(self, structures: Sequence[Structure]) -> None:
        """Cut further, device by device, in the middle of training."""
        self.structures = list(structures)
        self._set_masks()

    def arrays(self) -> list[dict[str, Array]]:
        """The adapters and the head of every device as they are now (narrow)."""
        stacked = self.resident.arrays()
        return [self._of(index, stacked) for index in range(len(self))]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _of(self, index: int, stacked: Arrays) -> dict[str, Array]:
        result = {}
        for name, values in stacked.items():
            value = values[index]
            if not name.startswith(HEAD):
                keep = self.resident.still_kept(name, self.structures[index])
                value = value if keep is None else np.take(value, keep[1], axis=keep[0])
                rank = self._ranks[index]
                value = value[:rank] if name.endswith(".A") else value[:, :rank]
            result[name] = np.ascontiguousarray(value)
        return result

    def _in(self, union: Structure, structure: Structure, arrays: Arrays) -> dict[str, Array]:
        """One device's adapters on the union, zero where the device has cut, at the largest rank."""
        shape = self.resident.shape
        wide = narrow(widen(arrays, structure, shape), union, rank_of(arrays, shape), shape)
        missing = max(self._ranks) - rank_of(arrays, shape)
        sides = {"A": ((0, missing), (0, 0)), "B": ((0, 0), (0, missing))}
        return {
            name: array if name.startswith(HEAD) else np.pad(array, sides[name[-1]]) for name, array in wide.items()
        }

    def _set_masks(self) -> None:
        for projection in self.resident.projections:
            if projection.axis == "columns":
                union = kept_features(projection, self.resident.structure)
                kept = np.stack([np.isin(union, kept_features(projection, each)) for each in self.structures])
                mask = torch.from_numpy(kept)[:, None, None, :].to(self.resident.device)
                self._masks[projection.name] = None if kept.all() else mask

    def _hide(self, projection: ModuleShape) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor | None]:
        def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
            mask = self._masks[projection.name]
            if mask is None:
                return None
            output: torch.Tensor = inputs[0].reshape(len(self), -1, *inputs[0].shape[1:]) * mask
            return output.flatten(0, 1)

        return before


@contextmanager
def partly(parameters: Sequence[nn.Parameter], shares: Sequence[float]) -> Iterator[None]:
    """Of whatever is done to stacked parameters meanwhile, only a share stays in the end, by device; 0: nothing."""
    devices = [device for device, share in enumerate(shares) if share != 1.0]
    before = [parameter.detach()[devices] for parameter in parameters] if devices else []
    yield
    with torch.no_grad():
        for parameter, values in zip(parameters, before, strict=bool(devices)):
            share = torch.tensor([shares[device] for device in devices], device=values.device)
            share = share.view(-1, *[1] * (values.ndim - 1))
            parameter[devices] = torch.where(share > 0, values.lerp(parameter[devices], share), values)


def _union(structures: Sequence[Structure]) -> Structure:
    masks = [
        tuple(np.logical_or.reduce([each.mask(layer, unit) for each in structures]) for unit in ("heads", "channels"))
        for layer in range(structures[0].layers)
    ]
    return Structure.from_masks([(heads, channels) for heads, channels in masks])


def _stacked(arrays: Sequence[Arrays]) -> dict[str, Array]:
    return {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
