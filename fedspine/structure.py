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
    """One of q, k, v, qkv, o, up, gate, gate_up, down."""
    d_out: int
    d_in: int
    unit: str
    """What is cut: `heads` or `channels`."""
    axis: str
    """`rows` when output features go, `columns` when inputs go (o, down)."""
    segments: tuple[int, ...]
    """The features that go lie in one segment or in several, one after the other (a fused projection); each holds so
    many of every unit, unit after unit."""

    @property
    def unit_size(self) -> int:
        """Features of one unit."""
        return sum(self.segments)

    def features(self, units: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A mask over units, as a mask over rows (or columns)."""
        return np.concatenate([np.repeat(units, size) for size in self.segments])


@dataclass(frozen=True)
class ModelShape:
    """The counts of a model that cost, schedule and structure need. Equal in every layer of the base model."""

    family: str
    layers: int
    hidden: int
    heads: int
    """Heads per layer. Where attention is grouped, KV groups: a key-value head with all its query heads."""
    queries: int
    """Query heads of one head (group): 1 where attention is not grouped."""
    head_dim: int
    """Inputs of `o` that one head (group) owns."""
    channels: int
    head_parameters: int
    """Parameters that go with one head: rows of q, k, v with biases, columns of o."""
    head_weights: int
    """Of these, without biases."""
    channel_parameters: int
    channel_weights: int
    total_parameters: int
    """Of the whole model, head of the task included."""
    head_bytes: int
    """Bytes of the trained task head in float32."""
    modules: tuple[ModuleShape, ...]
    """The linear layers that carry adapters."""
    vocabulary: int = 0
    """Outputs of a language model's head, which stays frozen; 0 of a classifier."""

    @property
    def prunable_parameters(self) -> int:
        return self.layers * (self.heads * self.head_parameters + self.channels * self.channel_parameters)


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
    def _bits(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        return self.head_bits, self.channel_bits

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

    def within(self, other: Structure) -> bool:
        """Whether it is of the same model, and keeps nothing that the other has cut."""
        ours, theirs = (*self.head_bits, *self.channel_bits), (*other.head_bits, *other.channel_bits)
        return (
            (self.heads, self.channels, self.layers) == (other.heads, other.channels, other.layers)
            and [len(bits) for bits in ours] == [len(bits) for bits in theirs]
            and not any(int.from_bytes(a) & ~int.from_bytes(b) for a, b in zip(ours, theirs, strict=True))
        )

    def above(self, first: int) -> Structure:
        """The same from layer `first` on, and nothing below."""
        parts = (tuple(bytes(len(each)) for each in bits[:first]) + bits[first:] for bits in self._bits)
        return Structure(self.heads, self.channels, *parts)

    def kept_parameters(self, shape: ModelShape) -> int:
        return sum(h * shape.head_parameters + c * shape.channel_parameters for h, c in self.counts())

    def sparsity(self, shape: ModelShape) -> float:
        """Share of the prunable parameters (heads and FFN channels with their biases) that is cut."""
        return 1.0 - self.kept_parameters(shape) / shape.prunable_parameters

    @property
    def nbytes(self) -> int:
        """Bytes that the structure takes on the wire."""
        return sum(len(bits) for bits in (*self.head_bits, *self.channel_bits))
