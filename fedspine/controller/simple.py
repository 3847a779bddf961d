"""The two controls: the same choice for everybody, and a random one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine.types import Action, Candidate, Pull


def safe_action(candidate: Candidate, rank: int) -> Action:
    """No more pruning than demanded, and the rank nearest to `rank`."""
    return Action(candidate.min_ratio, min(candidate.ranks, key=lambda allowed: (abs(allowed - rank), allowed)))


class FixedPolicy:
    """The sparsity floor and one rank for all."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        return tuple(safe_action(candidate, self._rank) for candidate in candidates)


class RandomPolicy:
    """Uniform in the allowed ratios and ranks."""

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        actions = []
        for candidate in candidates:
            rng = np.random.default_rng([*key, candidate.device])
            ratio = float(rng.uniform(candidate.min_ratio, candidate.max_ratio))
            actions.append(Action(ratio, int(rng.choice(candidate.ranks))))
        return tuple(actions)
