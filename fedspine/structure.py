"""Which heads and FFN channels a model keeps, always in the numbering of the uncut base model.

A structure is bits, not lists: one bit per head (per KV group where attention is grouped) and one per FFN channel.
It is hashable, comparable, and small enough to travel and to be kept for every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ModuleShape:
    """A linear layer that carries an adapter, and how cutting touches it."""

    name: str
    """Dotted name inside the model."""
    layer: int
    role: str
    """One of q, k, v, o, up, down, gate."""
    d_out: int
    d_in: int
    unit: str
    """What is cut: `heads` or `channels`."""
    axis: str
    """`rows` when output features go (q, k, v, up, gate), `columns` when inputs go (o, down)."""

    def cut_shape(self, units: int, unit_size: int) -> tuple[int, int]:
        """(d_out, d_in) when `units` of the unit are kept."""
        kept = units * unit_size
        return (kept, self.d_in) if self.axis == "rows" else (self.d_out, kept)


@dataclass(frozen=True)
class ModelShape:
    """The counts of a model that cost, schedule and structure need. Equal in every layer of the base model."""

    family: str
    layers: int
    hidden: int
    heads: int
    """Heads per layer (KV groups where attention is grouped)."""
    head_dim: int
    """Rows of the query projection that one head (group) owns."""
    channels: int
    head_parameters: int
    """Parameters that go with one head: rows of q, k, v with biases, columns of o."""
    channel_parameters: int
    total_parameters: int
    """Of the whole model, head of the task included."""
    head_bytes: int
    """Bytes of the trained task head in float32."""
    modules: tuple[ModuleShape, ...]
    """The linear layers that carry adapters."""

    @property
    def prunable_parameters(self) -> int:
        return self.layers * (self.heads * self.head_parameters + self.channels * self.channel_parameters)

    def unit_size(self, module: ModuleShape) -> int:
        return self.head_dim if module.unit == "heads" else 1


def _pack(mask: NDArray[np.bool_]) -> bytes:
    return np.packbits(mask).tobytes()


def _unpack(bits: bytes, count: int) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count).astype(np.bool_)


@dataclass(frozen=True)
class Structure:
    """Kept heads and channels of every layer, as packed bits."""

    heads: int
    """Heads per layer of the base model."""
    channels: int
    head_bits: tuple[bytes, ...]
    channel_bits: tuple[bytes, ...]

    @classmethod
    def full(cls, shape: ModelShape) -> Structure:
        every = [(np.ones(shape.heads, dtype=np.bool_), np.ones(shape.channels, dtype=np.bool_))] * shape.layers
        return cls.from_masks(every)

    @classmethod
    def from_masks(cls, masks: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> Structure:
        """From one (heads [heads], channels [channels]) pair of boolean masks per layer; True is kept."""
        return cls(
            heads=len(masks[0][0]),
            channels=len(masks[0][1]),
            head_bits=tuple(_pack(heads) for heads, _ in masks),
            channel_bits=tuple(_pack(channels) for _, channels in masks),
        )

    @property
    def layers(self) -> int:
        return len(self.head_bits)

    def head_mask(self, layer: int) -> NDArray[np.bool_]:
        return _unpack(self.head_bits[layer], self.heads)

    def channel_mask(self, layer: int) -> NDArray[np.bool_]:
        return _unpack(self.channel_bits[layer], self.channels)

    def mask(self, layer: int, unit: str) -> NDArray[np.bool_]:
        return self.head_mask(layer) if unit == "heads" else self.channel_mask(layer)

    def counts(self) -> tuple[tuple[int, int], ...]:
        """(kept heads, kept channels) per layer."""
        return tuple(
            (int(self.head_mask(layer).sum()), int(self.channel_mask(layer).sum())) for layer in range(self.layers)
        )

    def contains(self, other: Structure) -> bool:
        """True when everything that `other` keeps is kept here too."""
        return all(
            bool((self.mask(layer, unit) | ~other.mask(layer, unit)).all())
            for layer in range(self.layers)
            for unit in ("heads", "channels")
        )

    def kept_parameters(self, shape: ModelShape) -> int:
        return sum(h * shape.head_parameters + c * shape.channel_parameters for h, c in self.counts())

    def sparsity(self, shape: ModelShape) -> float:
        """Share of the prunable parameters (heads and FFN channels with their biases) that is cut."""
        return 1.0 - self.kept_parameters(shape) / shape.prunable_parameters

    @property
    def nbytes(self) -> int:
        """Bytes that the structure takes on the wire."""
        return sum(len(bits) for bits in (*self.head_bits, *self.channel_bits))
