"""Importance of heads and FFN channels, measured while a device tunes its adapters.

A scorer looks at every optimiser step between backward and step and keeps a moving average; what is cut scores 0. To
add one, write a class with `observe` and `scores` and name it in `SCORERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fedspine.lora.resident import ResidentModel
from fedspine.structure import ModuleShape, Structure
from fedspine.types import Array, Scores

DECAY = 0.9
"""Of the moving average over local iterations (LoRAPrune)."""


class Scorer(Protocol):
    """Measures the mounted model."""

    def observe(self) -> None:
        """Between backward and the optimiser's step."""

    def scores(self) -> Scores:
        """In base-model numbering: 0 where the structure is cut."""

    def close(self) -> None:
        """Leave the model as it was."""


class _Smoothed:
    """Moving average per layer and unit, in base-model numbering, with bias correction."""

    def __init__(self, resident: ResidentModel) -> None:
        shape = resident.shape
        self.resident = resident
        self._sums = [(np.zeros(shape.heads), np.zeros(shape.channels)) for _ in range(shape.layers)]
        self._mass = 0.0

    def add(self, values: list[tuple[Array, Array]]) -> None:
        """One observation on the mounted structure's kept heads and channels, layer by layer."""
        if not all(np.isfinite(part).all() for layer in values for part in layer):
            return
        structure = self.resident.structure
        for layer, parts in enumerate(values):
            for index, unit in enumerate(("heads", "channels")):
                total = self._sums[layer][index]
                total *= DECAY
                total[structure.mask(layer, unit)] += (1.0 - DECAY) * parts[index]
        self._mass = DECAY * self._mass + (1.0 - DECAY)

    def scores(self) -> Scores:
        return mask_scores(
            tuple(
                tuple((part / max(self._mass, 1e-12)).astype(np.float32) for part in layer)  # type: ignore[misc]
                for layer in self._sums
            ),
            self.resident.structure,
        )


class FisherScorer(_Smoothed):
    """Mask-gradient Fisher: the mean over examples of (z dL/dz)^2 with a mask z = 1 on every head and channel.

    dL/dz of a structure is the inner product of its output with that output's gradient, so it costs one
    elementwise product per layer and no base gradient. Source: the encoder path of APT (arXiv 2401.12200), after
    retraining-free pruning (arXiv 2204.09656).
    """

    def __init__(self, resident: ResidentModel, devices: int = 1) -> None:
        """`devices`: how many share a batch (`DeviceGroup`); each has its own scores."""
        super().__init__(resident)
        self._others = [_Smoothed(resident) for _ in range(devices - 1)]
        self._seen: dict[tuple[int, str], Array] = {}
        self._handles: list[RemovableHandle] = []
        for projection in resident.projections:
            if projection.axis == "columns":
                module = resident.model.get_submodule(projection.name)
                self._handles.append(module.register_forward_pre_hook(self._watch(projection)))

    def _watch(self, projection: ModuleShape) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor | None]:
        def take(value: torch.Tensor, gradient: torch.Tensor) -> None:
            per_example = (value * gradient).sum(1).float()
            if projection.unit_size > 1:
                per_example = per_example.reshape(len(per_example), -1, projection.unit_size).sum(2)
            by_device = per_example.square().reshape(1 + len(self._others), -1, per_example.shape[1])
            self._seen[projection.layer, projection.unit] = by_device.sum(1).cpu().numpy()

        def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
            if not torch.is_grad_enabled() or projection.layer < self.resident.first_layer:
                return None
            value = inputs[0]
            if not value.requires_grad:
                value = value.detach().requires_grad_()  # nothing below it trains
            return _Watched.apply(value, take)  # type: ignore[no-any-return, no-untyped-call]

        return before

    def observe(self, devices: Collection[int] | None = None) -> None:
        """`devices`: those of the batch that are still at work; by default all."""
        for layer, counts in enumerate(self.resident.structure.counts()[: self.resident.first_layer]):
            for unit, count in zip(("heads", "channels"), counts, strict=True):
                self._seen[layer, unit] = np.zeros((1 + len(self._others), count), np.float32)
        for device, smoothed in enumerate([self, *self._others]):
            if devices is not None and device not in devices:
                continue
            smoothed.add(
                [
                    (self._seen[layer, "heads"][device], self._seen[layer, "channels"][device])
                    for layer in range(self.resident.shape.layers)
                ]
            )
        self._seen.clear()

    def by_device(self) -> list[Scores]:
        """The scores of all devices that share the batch."""
        return [self.scores(), *(smoothed.scores() for smoothed in self._others)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Watched(torch.autograd.Function):
    """The identity; in the backward pass it hands its value and its gradient to a function.

    Autograd keeps the value, not a closure: so it is the tensor that the next product saves anyway, it is freed as soon
    as it was used, and gradient checkpointing may drop it and compute it again.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, take: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.take = take
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.take(*ctx.saved_tensors, *gradients)
        return gradients[0], None


class LoraGradientScorer(_Smoothed):
    """The paper's family of scores: first-order Taylor on the merged weight, from LoRA gradients only.

    G = gB A + B gA - gB gA is taken as the gradient of the weight, I = |G * (W + s B A)|; rows (or columns) are
    summed per structure, scaled to unit norm per projection, and summed over the projections of a group.
    It costs as much time as a third of a step. Source: LoRAPrune (arXiv 2305.18403), eq. for importance, before every
    step; FedSpine section on structured pruning.
    """

    def observe(self) -> None:
        shape, structure = self.resident.shape, self.resident.structure
        values = [
            (np.zeros(heads, dtype=np.float32), np.zeros(channels, dtype=np.float32))
            for heads, channels in structure.counts()
        ]
        with torch.no_grad():
            for module in shape.modules:
                a, b, weight = self.resident.lora(module)
                if a.grad is None and b.grad is None:
                    continue
                grad_a, grad_b = (torch.zeros_like(each) if each.grad is None else each.grad for each in (a, b))
                importance = estimated_gradient(a, b, grad_a, grad_b)
                importance.mul_(torch.addmm(weight, b, a, alpha=self.resident.scale)).abs_()
                vector = per_unit(importance, module)
                part = values[module.layer][0 if module.unit == "heads" else 1]
                part += (vector / (vector.norm() + 1e-8)).cpu().numpy()
        self.add(values)

    def close(self) -> None:
        pass


def estimated_gradient(a: torch.Tensor, b: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor) -> torch.Tensor:
    """gB A + B gA - gB gA [d_out, d_in]: minus the change of B A under a unit gradient step on both factors."""
    return grad_b @ (a - grad_a) + b @ grad_a


def per_unit(values: torch.Tensor, module: ModuleShape) -> torch.Tensor:
    """Sums of [d_out, d_in] values of a projection, one for every head or channel that is left in it."""
    features = values.sum(1 if module.axis == "rows" else 0)
    units = len(features) // module.unit_size
    segments = torch.split(features, [units * size for size in module.segments])
    return torch.stack([segment.view(units, -1).sum(1) for segment in segments]).sum(0)


class TaylorScorer(_Smoothed):
    """First-order Taylor of the frozen weights: |W * dL/dW|, summed over all projections of a head or channel.

    Source: LLM-Pruner (arXiv 2305.11627), `param_first` with groups summed; there the gradient is that of the mean over
    the calibration samples, here that of a mini-batch, and the scores are averaged. The gradient of a frozen weight is
    formed when the backward pass comes to its projection, and is gone when it leaves it.
    """

    def __init__(self, resident: ResidentModel) -> None:
        super().__init__(resident)
        self._values = self._zeros()
        self._handles = [
            resident.model.get_submodule(projection.name).register_forward_hook(self._watch(projection))
            for projection in resident.projections
        ]

    def _zeros(self) -> list[tuple[Array, Array]]:
        counts = self.resident.structure.counts()
        return [(np.zeros(heads, np.float32), np.zeros(channels, np.float32)) for heads, channels in counts]

    def _watch(self, projection: ModuleShape) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def after(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                value = inputs[0].detach()
                output.requires_grad_()  # also of what has no adapter and follows the embeddings
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: self._take(projection, value, gradient)
                )

        return after

    def _take(self, projection: ModuleShape, value: torch.Tensor, gradient: torch.Tensor) -> None:
        of_weight = gradient.flatten(0, -2).float().T @ value.flatten(0, -2).float()
        vector = per_unit(of_weight.mul_(self.resident.weight(projection)).abs_(), projection)
        part = self._values[projection.layer][0 if projection.unit == "heads" else 1]
        part += vector.cpu().numpy()

    def observe(self) -> None:
        self.add(self._values)
        self._values = self._zeros()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class MagnitudeScorer:
    """Squared norm of the merged weights of every structure, of projections with adapters; needs no data."""

    size: Callable[[torch.Tensor], torch.Tensor] = staticmethod(torch.square)

    def __init__(self, resident: ResidentModel) -> None:
        self.resident = resident
        self.modules: Sequence[ModuleShape] = resident.shape.modules

    def observe(self) -> None:
        pass

    def scores(self) -> Scores:
        shape, structure = self.resident.shape, self.resident.structure
        values = [(np.zeros(shape.heads, np.float32), np.zeros(shape.channels, np.float32)) for _ in structure.counts()]
        with torch.no_grad():
            for module in self.modules:
                weight = self.resident.weight(module)
                if module in shape.modules:
                    a, b, _ = self.resident.lora(module)
                    weight = torch.addmm(weight, b, a, alpha=self.resident.scale)
                part = values[module.layer][0 if module.unit == "heads" else 1]
                part[structure.mask(module.layer, module.unit)] += per_unit(self.size(weight), module).cpu().numpy()
        return tuple(values)

    def close(self) -> None:
        pass


class L1Scorer(MagnitudeScorer):
    """Sum of the absolute merged weights of every structure, of all its projections; needs no data.

    Source: FedMP (doi 10.1109/ICDE53745.2022.00062), which scores filters and neurons so.
    """

    size = staticmethod(torch.abs)

    def __init__(self, resident: ResidentModel) -> None:
        super().__init__(resident)
        self.modules = resident.projections


class RandomScorer:
    """The same random order for everybody, from the run's seed: the control."""

    def __init__(self, resident: ResidentModel, seed: int) -> None:
        self.resident = resident
        self._seed = seed

    def observe(self) -> None:
        pass

    def scores(self) -> Scores:
        shape = self.resident.shape
        rng = np.random.default_rng([self._seed, 7919])
        drawn = tuple(
            (rng.random(shape.heads, dtype=np.float32), rng.random(shape.channels, dtype=np.float32))
            for _ in range(shape.layers)
        )
        return mask_scores(drawn, self.resident.structure)

    def close(self) -> None:
        pass


SCORERS: dict[str, Callable[[ResidentModel, int], Scorer]] = {
    "fisher": lambda resident, seed: FisherScorer(resident),
    "lora-gradient": lambda resident, seed: LoraGradientScorer(resident),
    "magnitude": lambda resident, seed: MagnitudeScorer(resident),
    "l1": lambda resident, seed: L1Scorer(resident),
    "random": RandomScorer,
    "taylor": lambda resident, seed: TaylorScorer(resident),
}
"""By the value of the configuration key `importance`."""


def mask_scores(scores: Scores, structure: Structure) -> Scores:
    """Zero what the structure does not keep."""
    return tuple(
        (
            np.where(structure.head_mask(layer), heads, 0).astype(np.float32),
            np.where(structure.channel_mask(layer), channels, 0).astype(np.float32),
        )
        for layer, (heads, channels) in enumerate(scores)
    )
