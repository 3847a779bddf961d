"""Self-pruning of the rank in HetLoRA (arXiv 2401.06432): a device that does not need its last components drops them.

The last components of a device's adapters, those beyond a share gamma of its rank, are made small by a term beside the
loss, lambda ||B_tail||_F ||A_tail||_F in every projection. If the sum of these products fell in a round, the tail goes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fedspine.lora.adapters import HEAD
from fedspine.lora.resident import ResidentModel
from fedspine.structure import Structure
from fedspine.types import Array

LAMBDA = 0.01
"""Strength of the term."""


class RankTail:
    """The components of the mounted adapters from the `kept`-th on."""

    def __init__(self, resident: ResidentModel, kept: int) -> None:
        self._resident = resident
        self._kept = kept
        self._before = self.size()

    def size(self) -> float:
        """Sum of ||B_tail||_F ||A_tail||_F over the projections."""
        return sum(float(b.norm() * a.norm()) for _, (a, b) in self._tails())

    def add_gradients(self) -> None:
        """Those of the term, to the gradients of the loss; where a factor is zero its own is taken as zero."""
        with torch.no_grad():
            for (whole_a, whole_b), (a, b) in self._tails():
                size_a, size_b = a.norm(), b.norm()
                if whole_a.grad is not None and size_a > 0:
                    whole_a.grad[self._kept :] += LAMBDA * size_b / size_a * a
                if whole_b.grad is not None and size_b > 0:
                    whole_b.grad[:, self._kept :] += LAMBDA * size_a / size_b * b

    def cut(self, structure: Structure) -> None:
        """Nothing is kept that has a structure."""

    def dropped(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """A device's arrays (narrow) after its round: without the tail, if that fell."""
        if not self.size() < self._before:
            return arrays
        return {name: array if name.startswith(HEAD) else self._without(name, array) for name, array in arrays.items()}

    def _without(self, name: str, array: Array) -> Array:
        return array[: self._kept] if name.endswith(".A") else array[:, : self._kept].copy()

    def _tails(self) -> list[tuple[tuple[nn.Parameter, nn.Parameter], tuple[torch.Tensor, torch.Tensor]]]:
        """((A, B), (last rows of A, last columns of B)) of every projection."""
        pairs = [self._resident.lora(module)[:2] for module in self._resident.shape.modules]
        return [((a, b), (a.detach()[self._kept :], b.detach()[:, self._kept :])) for a, b in pairs]


def kept_rank(rank: int, decay: float, least: int) -> int:
    """What is left of a rank when it shrinks once: floor(decay * rank), but no less than `least`."""
    return min(rank, max(least, math.floor(decay * rank)))
