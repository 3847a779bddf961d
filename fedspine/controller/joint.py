"""The cohort's decision: the most progress per second of a synchronous round.

A round lasts as long as its slowest device, so single choices matter only through a common deadline. For every
possible deadline, each device takes its best arm that meets it; the deadline with the largest (sum of qualities) /
(deadline) wins. The slowest device takes a cheap arm, and the others use the time that is there anyway.

The quality of an arm starts from a prior: the value of a rank saturates, 1 - 0.55 exp(-rank / 4) (from a simulation,
not fitted to training), and pruning ahead of the schedule costs a little, so that it is done where it buys time.
`FedSpinePolicy` corrects the prior with what the rounds of all devices have shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedspine.controller.policy import Oracle
from fedspine.controller.simple import safe_action
from fedspine.controller.time_model import learn_rates, rates_of
from fedspine.controller.tree import Point, grow, statistics
from fedspine.cost import Workload
from fedspine.types import TRAINED, Action, Candidate, Pull

RATIO_LEVELS = 4
AHEAD_COST = 0.2
"""Quality that one unit of sparsity ahead of the floor costs."""
DEADLINES = 512
"""At most so many deadlines are tried, evenly over the arms' times."""
QUALITY_DISCOUNT = 0.995
QUALITY_WEIGHT = 0.3
QUALITY_PRIOR_PULLS = 20.0
QUALITY_BONUS = 0.02

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Arms:
    """Choices of one device, with predicted seconds and quality."""

    actions: tuple[Action, ...]
    seconds: Floats
    quality: Floats


def arms_of(candidate: Candidate) -> tuple[Action, ...]:
    """A grid over the allowed ratios and ranks."""
    ratios = np.unique(np.linspace(candidate.min_ratio, candidate.max_ratio, RATIO_LEVELS))
    return tuple(Action(float(ratio), rank) for ratio in ratios for rank in candidate.ranks)


def prior_quality(candidate: Candidate, action: Action) -> float:
    """Expected progress of a round with this arm, in arbitrary units near 1."""
    ahead = action.pruning_ratio - candidate.min_ratio
    return 1.0 - 0.55 * math.exp(-action.lora_rank / 4.0) - AHEAD_COST * ahead


def choose(cohort: Sequence[Arms]) -> tuple[Action, ...]:
    """Best arm of every device under the deadline with the most quality per second."""
    fronts = [_front(arms) for arms in cohort]
    earliest = max(float(seconds[0]) for seconds, _, _ in fronts)
    times = np.unique(np.concatenate([seconds for seconds, _, _ in fronts]))
    deadlines = times[times >= earliest]
    if len(deadlines) > DEADLINES:
        deadlines = deadlines[np.linspace(0, len(deadlines) - 1, DEADLINES).astype(np.int64)]
    total = np.zeros(len(deadlines))
    for seconds, quality, _ in fronts:
        total += quality[np.searchsorted(seconds, deadlines, side="right") - 1]
    deadline = deadlines[int(np.argmax(total / deadlines))]
    chosen = []
    for arms, (seconds, _, index) in zip(cohort, fronts, strict=True):
        chosen.append(arms.actions[index[np.searchsorted(seconds, deadline, side="right") - 1]])
    return tuple(chosen)


def _front(arms: Arms) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """(seconds ascending, quality ascending, arm) of the arms that no cheaper arm matches."""
    order = np.lexsort((-arms.quality, arms.seconds))
    best = np.maximum.accumulate(arms.quality[order])
    keep = np.concatenate([[True], best[1:] > best[:-1]])
    return arms.seconds[order][keep], best[keep], order[keep]


class Clairvoyant:
    """The joint decision with the true times of the round: the bound that learning can approach."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        cohort = []
        for candidate in candidates:
            actions = arms_of(candidate)
            seconds = [
                self._oracle(round, candidate.device, action.pruning_ratio, action.lora_rank) for action in actions
            ]
            quality = [prior_quality(candidate, action) for action in actions]
            cohort.append(Arms(actions, np.array(seconds), np.array(quality)))
        return choose(cohort)


class TimeModelPolicy:
    """The joint decision with learned rates and the prior quality. The first choice is the safe one."""

    def __init__(self, workload: Workload, safe_rank: int) -> None:
        self._workload = workload
        self._safe_rank = safe_rank

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        rates = rates_of(candidates, learn_rates(pulls))
        correction = self._correction(candidates, pulls)
        cohort = []
        for candidate, rate in zip(candidates, rates, strict=True):
            if rate is None:
                return tuple(safe_action(each, self._safe_rank) for each in candidates)
            actions = arms_of(candidate)
            seconds = [
                rate.seconds_per_flop * self._workload.planned_flops(action.pruning_ratio, action.lora_rank)
                + rate.seconds_per_byte * self._workload.planned_bytes(action.pruning_ratio, action.lora_rank)
                for action in actions
            ]
            quality = [prior_quality(candidate, action) + correction(candidate, action) for action in actions]
            cohort.append(Arms(actions, np.array(seconds), np.array(quality)))
        return choose(cohort)

    def _correction(self, candidates: Sequence[Candidate], pulls: Sequence[Pull]) -> _Correction:
        return _Correction((), (), np.zeros(0))


class FedSpinePolicy(TimeModelPolicy):
    """The joint decision with learned rates and a quality tree that all devices share."""

    def __init__(self, workload: Workload, safe_rank: int, ranks: tuple[int, ...]) -> None:
        super().__init__(workload, safe_rank)
        self._ranks = ranks

    def _correction(self, candidates: Sequence[Candidate], pulls: Sequence[Pull]) -> _Correction:
        ranks = self._ranks
        done = [pull for pull in pulls if pull.report.outcome == TRAINED]
        if not done:
            return super()._correction(candidates, pulls)
        points = [_point(pull.ratio_before, pull.action, ranks) for pull in done]
        qualities = [pull.quality for pull in done]
        leaves = grow(points)
        counts, means = statistics(leaves, qualities, QUALITY_DISCOUNT)
        mean = float(np.sum(counts * means) / np.sum(counts))
        trust = counts / (counts + QUALITY_PRIOR_PULLS)
        bonus = QUALITY_BONUS * np.sqrt(math.log1p(float(counts.sum())) / (1.0 + counts))
        values = QUALITY_WEIGHT * trust * (means - mean) + bonus
        return _Correction(tuple((leaf.low, leaf.high) for leaf in leaves), ranks, values)


@dataclass(frozen=True)
class _Correction:
    """Value by leaf of the shared tree; zero without one."""

    boxes: tuple[tuple[Point, Point], ...]
    ranks: tuple[int, ...]
    values: Floats

    def __call__(self, candidate: Candidate, action: Action) -> float:
        if not self.boxes:
            return 0.0
        x, y = _point(candidate.ratio, action, self.ranks)
        for (low, high), value in zip(self.boxes, self.values, strict=True):
            if low[0] <= x and (x < high[0] or high[0] >= 1) and low[1] <= y and (y < high[1] or high[1] >= 1):
                return float(value)
        return 0.0


def _point(before: float, action: Action, ranks: tuple[int, ...]) -> Point:
    """(pruning step, log rank) in the unit square; a step of a quarter or more is the far edge."""
    step = min(max(4.0 * (action.pruning_ratio - before), 0.0), 1.0)
    span = math.log2(ranks[-1]) - math.log2(ranks[0])
    rank = (math.log2(action.lora_rank) - math.log2(ranks[0])) / span if span else 0.0
    return step, min(max(rank, 0.0), 1.0)
