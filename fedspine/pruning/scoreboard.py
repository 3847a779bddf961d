"""What the server knows of importance: one shared score, and each device's own where masks need it.

Devices keep different structures, so a plain mean would make what many have cut look unimportant to all. A shared
score is therefore averaged over the devices that still keep a structure, each device's scores first scaled to agree
in sum with the shared score over what that device keeps (kept-count correction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedspine.structure import Structure
from fedspine.types import Array, Scores

SHARED_DECAY = 0.7
"""Weight of the past in the shared score, per round."""
OWN_DECAY = 0.3
"""Weight of the past in a device's own score, per participation."""
MIXED_PRIOR = 5.0
"""Participations after which a device's own score weighs as much as the shared one (masks = mixed)."""


def update_shared(shared: Scores | None, replies: Sequence[tuple[Structure, Scores]]) -> Scores | None:
    """The shared score after a round; structures that no device of the round keeps stay as they were."""
    if not replies:
        return shared
    layers = []
    for layer in range(replies[0][0].layers):
        parts = []
        for index, unit in enumerate(("heads", "channels")):
            past = None if shared is None else shared[layer][index]
            observed = [(structure.mask(layer, unit), scores[layer][index]) for structure, scores in replies]
            parts.append(_merge(past, observed))
        layers.append((parts[0], parts[1]))
    return tuple(layers)


def update_own(past: Scores | None, new: Scores) -> Scores:
    """A device's own score after it took part once more, on the structure it now keeps."""
    new = _normalised(new)
    if past is None:
        return new
    past = _normalised(past)
    return _combine(past, new, OWN_DECAY)


def blend(own: Scores, shared: Scores, participations: int) -> Scores:
    """Shrinkage of a device's own score towards the shared one: n / (n + n0)."""
    weight = participations / (participations + MIXED_PRIOR)
    return _combine(_normalised(own), _normalised(shared), weight)


def pruning_scores(
    masks: str,
    device: int,
    shared: Scores | None,
    own: Mapping[int, Scores],
    participations: int,
) -> Scores | None:
    """The score that cuts a device; a device without one of its own is cut by the shared one."""
    if masks == "shared" or device not in own or shared is None:
        return shared
    if masks == "own":
        return own[device]
    return blend(own[device], shared, participations)


def _merge(past: Array | None, observed: Sequence[tuple[NDArray[np.bool_], Array]]) -> Array:
    total = np.zeros(len(observed[0][1]))
    count = np.zeros(len(total))
    for mask, scores in observed:
        reference = float(mask.sum()) if past is None else float(past[mask].sum())
        own = float(scores[mask].sum())
        if own > 0:
            total[mask] += scores[mask] * (reference / own)
            count[mask] += 1
    mean = total / np.maximum(count, 1)
    if past is None:
        return mean.astype(np.float32)
    return np.where(count > 0, SHARED_DECAY * past + (1.0 - SHARED_DECAY) * mean, past).astype(np.float32)


def _normalised(scores: Scores) -> Scores:
    """Mean 1 over what has a score, per layer and unit."""

    def unit(part: Array) -> Array:
        positive = part[part > 0]
        return (part / positive.mean()).astype(np.float32) if len(positive) else part

    return tuple((unit(heads), unit(channels)) for heads, channels in scores)


def _combine(first: Scores, second: Scores, weight: float) -> Scores:
    return tuple(
        (
            (weight * a[0] + (1.0 - weight) * b[0]).astype(np.float32),
            (weight * a[1] + (1.0 - weight) * b[1]).astype(np.float32),
        )
        for a, b in zip(first, second, strict=True)
    )
