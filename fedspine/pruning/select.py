"""Which structures to cut for a given ratio, least important first. Cutting is monotone: only what is kept can go.

The budget `uniform` cuts the same share of every layer (LoRAPrune, arXiv 2305.18403). The number of heads is rounded,
and the FFN channels make up for it, so that the sparsity in parameters is exact to half a channel per layer. A head
goes only when enough channels are left to make up for it: otherwise a model that was cut in steps would end above the
ratio.

The budget `global` compares heads and channels of all layers by score per parameter (the salience density of APT, arXiv
2401.12200). Scores have a common scale only among the heads, or the channels, of one layer: gradients differ in size
between layers, and the server's scores are averages of scaled ones. So the heads of a layer are taken to be worth
together what they weigh, and so are its channels: the density of a unit is its score over the mean of its kind in its
layer. The ratio is reached, and passed by less than one head or channel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.errors import ModelError
from fedspine.structure import ModelShape, Structure
from fedspine.types import Scores

CHANNEL_FLOOR = 1 / 24
"""Smallest share of a layer's FFN channels that stays; one head always stays."""


def max_sparsity(shape: ModelShape) -> float:
    """Largest sparsity that leaves every layer a head and its floor of channels."""
    kept = shape.head_parameters + _least_channels(shape) * shape.channel_parameters
    return 1.0 - shape.layers * kept / shape.prunable_parameters


def check_reachable(target: float, shape: ModelShape) -> None:
    """Errors: `ModelError` when the target sparsity cannot be reached."""
    limit = max_sparsity(shape)
    if target > limit:
        raise ModelError(
            f"target_sparsity = {target}: this model can be cut to at most {limit:.3f} of its prunable parameters "
            f"(every layer keeps 1 of {shape.heads} heads and {_least_channels(shape)} of {shape.channels} channels)"
        )


def layer_budget(ratio: float, shape: ModelShape, kept: tuple[int, int] | None = None) -> tuple[int, int]:
    """(heads, channels) to keep of a layer at a ratio of its prunable parameters; `kept` is what it has (default all).

    More channels than it has mean that the layer is cut that far already. For the budget `uniform`.
    """
    most_heads, most_channels = kept or (shape.heads, shape.channels)
    heads = min(most_heads, max(1, round((1.0 - ratio) * shape.heads)))
    while (channels := _channels_beside(heads, ratio, shape)) > most_channels and heads < most_heads:
        heads += 1
    return heads, min(shape.channels, max(_least_channels(shape), channels))


def select(structure: Structure, scores: Scores, ratio: float, shape: ModelShape, budget: str = "uniform") -> Structure:
    """Cut `structure` to `ratio` by `scores`; a structure that is cut that far already stays as it is.

    `budget`: `uniform` or `global`, the value of the configuration key `layer_budget`.
    """
    if budget == "global":
        return _select_globally(structure, scores, ratio, shape)
    masks = []
    for layer, (head_scores, channel_scores) in enumerate(scores):
        kept = int(structure.head_mask(layer).sum()), int(structure.channel_mask(layer).sum())
        heads, channels = layer_budget(ratio, shape, kept)
        masks.append(
            (
                _keep_best(structure.head_mask(layer), head_scores, heads),
                _keep_best(structure.channel_mask(layer), channel_scores, channels),
            )
        )
    return Structure.from_masks(masks)


def recut(structure: Structure, scores: Scores, ratio: float, shape: ModelShape, config: RunConfig) -> Structure:
    """What a device goes on with, at a ratio that is not below the one it has: what is left, cut further.

    With `regrowth` all devices are cut from the whole model, by the latest scores: those that come early, when nothing
    is learned yet, decide nothing for good, and devices at the same ratio keep the same (dynamic masks as those of
    PruneFL, arXiv 1909.12326). It costs a device no traffic: adapters travel in any case, and the base model lies on
    its disk.
    """
    before = Structure.full(shape) if config.regrowth else structure
    return select(before, scores, ratio, shape, config.layer_budget)


def _select_globally(structure: Structure, scores: Scores, ratio: float, shape: ModelShape) -> Structure:
    """Arrays are [layers, heads + channels]; every layer keeps its best head and its floor of channels."""
    left = round((1.0 - ratio) * shape.prunable_parameters)
    if structure.kept_parameters(shape) <= left:
        return structure
    kept, floor, densities = [], [], []
    for layer, (head_scores, channel_scores) in enumerate(scores):
        heads, channels = structure.head_mask(layer), structure.channel_mask(layer)
        kept.append(np.concatenate([heads, channels]))
        best = _keep_best(heads, head_scores, 1), _keep_best(channels, channel_scores, _least_channels(shape))
        floor.append(np.concatenate(best))
        densities.append(np.concatenate([_over_mean(head_scores), _over_mean(channel_scores)]))
    sizes = np.repeat([shape.head_parameters, shape.channel_parameters], [shape.heads, shape.channels])
    density = np.stack(densities)
    density[np.stack(floor)] = np.inf
    density[~np.stack(kept)] = -np.inf
    order = np.argsort(-density, axis=None, kind="stable")[: np.sum(kept)]
    costs = np.cumsum(np.broadcast_to(sizes, density.shape).ravel()[order])
    fits = max(int(np.searchsorted(costs, left, side="right")), int(np.sum(floor)))
    # Where a head is too large for what is left, the best of the remaining channels fill it.
    others = order[fits:][order[fits:] % len(sizes) >= shape.heads]
    room = max(0, int((left - costs[fits - 1]) // shape.channel_parameters))
    result = np.zeros(density.shape, dtype=np.bool_)
    result.flat[np.concatenate([order[:fits], others[:room]])] = True
    return Structure.from_masks([(row[: shape.heads], row[shape.heads :]) for row in result])


def _over_mean(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Over all that the layer had before it was cut, so that a layer does not lose worth by being cut."""
    exact = scores.astype(np.float64)
    mean = float(exact.mean())
    return exact / mean if mean > 0 else exact


def _channels_beside(heads: int, ratio: float, shape: ModelShape) -> int:
    left = (1.0 - ratio) * shape.prunable_parameters / shape.layers - heads * shape.head_parameters
    return round(left / shape.channel_parameters)


def _keep_best(mask: NDArray[np.bool_], scores: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    kept = np.flatnonzero(mask)
    if len(kept) <= count:
        return mask
    best = kept[np.argsort(-scores[kept], kind="stable")[:count]]
    result = np.zeros_like(mask)
    result[best] = True
    return result


def _least_channels(shape: ModelShape) -> int:
    return max(1, round(shape.channels * CHANNEL_FLOOR))
