"""E-UCB of FedMP (doi 10.1109/ICDE53745.2022.00062): one bandit per device over the pruning ratio alone.

The ratios, as shares of the target sparsity, are a partition of [0, 1) that is split at every sample until a piece is
no longer than theta. U = mean + sqrt(2 log n / N) with counts and means discounted by lambda, a piece without samples
first; the ratio is drawn uniformly in the piece of the largest U. In FedMP a worker's ratio is free in every round.
Here a cut is for good and the schedule has a floor, so that pieces out of reach are left out, and a draw is clipped.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedspine.controller.policy import pulls_by_device
from fedspine.controller.simple import safe_action
from fedspine.types import Action, Candidate, Pull

DISCOUNT = 0.98
THETA = 0.05
"""Length below which a piece is not split: the granularity of the exploration."""


class EUcbPolicy:
    """Learns the ratio from the scalar reward of each device's own pulls; the rank is the same for all."""

    def __init__(self, target: float, rank: int) -> None:
        self._target = max(target, 1e-9)
        self._rank = rank

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        own = pulls_by_device(candidates, pulls)
        return tuple(self._choose(candidate, own[candidate.device], key) for candidate in candidates)

    def _choose(self, candidate: Candidate, own: Sequence[Pull], key: tuple[int, ...]) -> Action:
        safe = safe_action(candidate, self._rank)
        points = [min(pull.action.pruning_ratio / self._target, 1.0) for pull in own]
        edges = partition(points)
        counts, means = discounted(edges, points, [pull.reward for pull in own])
        bonus = np.sqrt(2.0 * math.log(max(float(counts.sum()), 1.0)) / np.maximum(counts, 1e-12))
        index = np.where(counts > 0, means + bonus, np.inf)
        low, high = (min(ratio / self._target, 1.0) for ratio in (candidate.min_ratio, candidate.max_ratio))
        reachable = [left <= high and (low < right or right >= 1.0) for left, right in pairwise(edges)]
        index[~np.array(reachable)] = -np.inf
        rng = np.random.default_rng([*key, candidate.device])
        place = int(rng.choice(np.flatnonzero(index == index.max())))
        ratio = float(rng.uniform(edges[place], edges[place + 1])) * self._target
        return Action(min(max(ratio, candidate.min_ratio), candidate.max_ratio), safe.lora_rank)


def partition(points: Sequence[float]) -> list[float]:
    """The edges of the pieces after samples at `points`, in order: from 0 to 1, ascending."""
    edges = [0.0, 1.0]
    for point in points:
        place = piece(edges, point)
        left, right = edges[place : place + 2]
        if right - left > THETA and left < point < right:
            insort(edges, point)
    return edges


def piece(edges: Sequence[float], point: float) -> int:
    """Which piece [left, right) a point is in; 1 belongs to the last."""
    return min(bisect_right(edges, point) - 1, len(edges) - 2)


def discounted(
    edges: Sequence[float], points: Sequence[float], rewards: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(discounted count, discounted mean reward) of every piece; the newest sample weighs 1."""
    counts, sums = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for age, (point, reward) in enumerate(zip(reversed(points), reversed(rewards), strict=True)):
        place = piece(edges, point)
        counts[place] += DISCOUNT**age
        sums[place] += DISCOUNT**age * reward
    return counts, np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
