"""Adaptive ranks of APT (arXiv 2401.12200, section 4.3): larger for the projections whose adapters matter most.

All projections start at `fixed_rank`. The budget of adapter values grows with the ramp of the sparsity, to
`rank_growth` times the start; in every round that it exceeds what there is, the more salient half of the projections
is scaled by the quotient, rounded down and bounded by `max_rank`. New components have a random A and a zero B, so that
they change nothing. APT adapts one model; here the devices measure (`lora/rank_salience.py`), the server decides for
all of them. Its self-distillation is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.controller.schedule import ramp
from fedspine.lora.adapters import start_adapters
from fedspine.randomness import Purpose, generator
from fedspine.structure import ModelShape
from fedspine.types import TRAINED, Arrays, RoundRecord


def allotted(config: RunConfig, records: Sequence[RoundRecord], shape: ModelShape) -> tuple[int, ...]:
    """The rank of every projection in the round after these."""
    ranks = np.full(len(shape.modules), config.fixed_rank)
    sizes = np.array([module.d_out + module.d_in for module in shape.modules])
    for record in records:
        grown = 1.0 + (config.rank_growth - 1.0) * ramp(config, record.round + 1)
        found = [pull.report.module_salience for pull in record.pulls if pull.report.outcome == TRAINED]
        budget = config.fixed_rank * sizes.sum() * grown
        ranks = grow(ranks, sizes, mean_salience(found), budget, config.max_rank)
    return tuple(ranks.tolist())


def grow(
    ranks: NDArray[np.int64], sizes: NDArray[np.int64], salience: NDArray[np.float64], budget: float, most: int
) -> NDArray[np.int64]:
    """Ranks after one step towards `budget` values; `sizes`: values of a projection's adapter at rank 1."""
    quotient = budget / (ranks @ sizes)
    top = np.argsort(-salience, kind="stable")[: len(ranks) // 2]
    result = ranks.copy()
    result[top] = np.maximum(ranks[top], np.minimum(most, np.floor(ranks[top] * quotient).astype(np.int64)))
    return result


def mean_salience(found: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Over devices, each scaled to a sum of 1: [projections]."""
    values = np.array(found, dtype=np.float64)
    totals = values.sum(1, keepdims=True)
    return np.asarray((values / np.where(totals > 0, totals, 1.0)).mean(0))


def for_rank(ranks: tuple[int, ...], rank: int, config: RunConfig) -> tuple[int, ...]:
    """The allotment of a device that was given another rank than `fixed_rank`, for want of memory."""
    return tuple(max(1, each * rank // config.fixed_rank) for each in ranks)


def awakened(arrays: Arrays, config: RunConfig, round: int, shape: ModelShape) -> Arrays:
    """Adapters with new random rows of A for those that zero-padding has left at zero: nothing could train there."""
    fresh = start_adapters(shape, config.max_rank, generator(config.seed, round, 0, Purpose.ADAPTERS))
    names = [f"{module.name}.A" for module in shape.modules]
    return {
        **arrays,
        **{name: np.where(arrays[name].any(1, keepdims=True), arrays[name], fresh[name]) for name in names},
    }
