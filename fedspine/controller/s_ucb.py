"""S-UCB as the paper has it: one agent per device over the continuous (ratio, rank) space.

Discounted upper confidence bound over the leaves of a tree that refines with the samples (FedSpine, arXiv 2501.02438;
E-UCB of FedMP, doi 10.1109/ICDE53745.2022.00062; discounting after Garivier and Moulines, arXiv 0805.3415):
U = mean + c sqrt(log(1 + N) / N_leaf), an unvisited leaf first, then a uniform draw inside the leaf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedspine.controller.policy import pulls_by_device
from fedspine.controller.tree import Leaf, Point, grow, statistics
from fedspine.types import Action, Candidate, Pull

DISCOUNT = 0.98
EXPLORATION = 0.05


class SUcbPolicy:
    """Learns from the scalar reward of each device's own pulls."""

    def __init__(self, target: float, ranks: tuple[int, ...]) -> None:
        self._target = max(target, 1e-9)
        self._ranks = ranks

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        own = pulls_by_device(candidates, pulls)
        return tuple(self._choose(candidate, own[candidate.device], key) for candidate in candidates)

    def _choose(self, candidate: Candidate, own: Sequence[Pull], key: tuple[int, ...]) -> Action:
        rng = np.random.default_rng([*key, candidate.device])
        leaves = grow([self._point(pull.action) for pull in own])
        counts, means = statistics(leaves, [pull.reward for pull in own], DISCOUNT)
        bonus = EXPLORATION * np.sqrt(math.log1p(float(counts.sum())) / np.maximum(counts, 1e-12))
        index = np.where(counts > 0, means + bonus, np.inf)
        inside = [self._ranks_inside(candidate, leaf) for leaf in leaves]
        index[[not ranks for ranks in inside]] = -np.inf  # out of reach, it would stay unvisited and first for ever
        place = int(rng.choice(np.flatnonzero(index == index.max())))
        ratio = float(rng.uniform(leaves[place].low[0], leaves[place].high[0])) * self._target
        ratio = min(max(ratio, candidate.min_ratio), candidate.max_ratio)
        return Action(ratio, int(rng.choice(inside[place])))

    def _ranks_inside(self, candidate: Candidate, leaf: Leaf) -> list[int]:
        """The allowed ranks in a leaf; none when no allowed ratio is in it."""
        ratio = min(max(leaf.low[0] * self._target, candidate.min_ratio), candidate.max_ratio)
        return [rank for rank in candidate.ranks if leaf.contains(self._point(Action(ratio, rank)))]

    def _point(self, action: Action) -> Point:
        x = min(max(action.pruning_ratio / self._target, 0.0), 1.0)
        y = (self._log_rank(action.lora_rank) - self._log_rank(self._ranks[0])) / self._span if self._span else 0.0
        return x, min(max(y, 0.0), 1.0)

    @property
    def _span(self) -> float:
        return self._log_rank(self._ranks[-1]) - self._log_rank(self._ranks[0])

    @staticmethod
    def _log_rank(rank: int) -> float:
        return math.log2(rank)
