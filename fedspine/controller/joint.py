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
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedspine.controller.policy import Oracle
from fedspine.controller.simple import safe_action
from fedspine.controller.time_model import learn_rates, rates_of
from fedspine.controller.tree import grow, statistics
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
    return _grid(candidate.min_ratio, candidate.max_ratio, candidate.ranks)


@lru_cache(maxsize=4096)
def _grid(lowest: float, highest: float, ranks: tuple[int, ...]) -> tuple[Action, ...]:
    ratios = np.unique(np.linspace(lowest, highest, RATIO_LEVELS))
    return tuple(Action(float(ratio), rank) for ratio in ratios for rank in ranks)


@dataclass(frozen=True)
class Grid:
    """The arms of a whole cohort side by side, so that they are priced in a few array operations."""

    actions: tuple[tuple[Action, ...], ...]
    """By device."""
    ratios: Floats
    ranks: Floats
    current: Floats
    """What the arm's device has cut already."""
    lowest: Floats
    """Smallest ratio that the arm's device may have."""

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Grid:
        actions = tuple(map(arms_of, candidates))
        counts = [len(arms) for arms in actions]
        flat = [action for arms in actions for action in arms]
        return cls(
            actions,
            np.array([action.pruning_ratio for action in flat]),
            np.array([action.lora_rank for action in flat], dtype=np.float64),
            np.repeat([candidate.ratio for candidate in candidates], counts),
            np.repeat([candidate.min_ratio for candidate in candidates], counts),
        )

    def prior(self) -> Floats:
        """Expected progress of a round with each arm, in arbitrary units near 1."""
        return 1.0 - 0.55 * np.exp(-self.ranks / 4.0) - AHEAD_COST * (self.ratios - self.lowest)

    def by_arm(self, values: Sequence[float]) -> Floats:
        """A value of every device, repeated for its arms."""
        return np.repeat(values, [len(arms) for arms in self.actions])

    def cohort(self, seconds: Floats, quality: Floats) -> list[Arms]:
        """Priced arms, device by device."""
        ends = np.cumsum([len(arms) for arms in self.actions])[:-1]
        parts = zip(self.actions, np.split(seconds, ends), np.split(quality, ends), strict=True)
        return [Arms(*part) for part in parts]


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
        grid = Grid.of(candidates)
        seconds = [
            self._oracle(round, candidate.device, action.pruning_ratio, action.lora_rank)
            for candidate, actions in zip(candidates, grid.actions, strict=True)
            for action in actions
        ]
        return choose(grid.cohort(np.array(seconds), grid.prior()))


class TimeModelPolicy:
    """The joint decision with learned rates and the prior quality. The first choice is the safe one."""

    def __init__(self, workload: Workload, safe_rank: int) -> None:
        self._workload = workload
        self._safe_rank = safe_rank

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        rates = rates_of(candidates, learn_rates(pulls))
        known = [rate for rate in rates if rate is not None]
        if len(known) < len(rates):
            return tuple(safe_action(each, self._safe_rank) for each in candidates)
        grid = Grid.of(candidates)
        seconds = grid.by_arm([rate.seconds_per_flop for rate in known]) * self._workload.planned_flops(
            grid.ratios, grid.ranks
        ) + grid.by_arm([rate.seconds_per_byte for rate in known]) * self._workload.planned_bytes(
            grid.ratios, grid.ranks
        )
        return choose(grid.cohort(seconds, grid.prior() + self._correction(grid, pulls)))

    def _correction(self, grid: Grid, pulls: Sequence[Pull]) -> Floats:
        return np.zeros(len(grid.ratios))


class FedSpinePolicy(TimeModelPolicy):
    """The joint decision with learned rates and a quality tree that all devices share."""

    def __init__(self, workload: Workload, safe_rank: int, ranks: tuple[int, ...]) -> None:
        super().__init__(workload, safe_rank)
        self._ranks = ranks

    def _correction(self, grid: Grid, pulls: Sequence[Pull]) -> Floats:
        done = [pull for pull in pulls if pull.report.outcome == TRAINED]
        if not done:
            return super()._correction(grid, pulls)
        x, y = self._points(
            np.array([pull.action.pruning_ratio - pull.ratio_before for pull in done]),
            np.array([pull.action.lora_rank for pull in done], dtype=np.float64),
        )
        leaves = grow(list(zip(x.tolist(), y.tolist(), strict=True)))
        counts, means = statistics(leaves, [pull.quality for pull in done], QUALITY_DISCOUNT)
        mean = float(np.sum(counts * means) / np.sum(counts))
        trust = counts / (counts + QUALITY_PRIOR_PULLS)
        bonus = QUALITY_BONUS * np.sqrt(math.log1p(float(counts.sum())) / (1.0 + counts))
        values = QUALITY_WEIGHT * trust * (means - mean) + bonus
        x, y = self._points(grid.ratios - grid.current, grid.ranks)
        correction = np.zeros(len(x))
        for leaf, value in zip(leaves, values, strict=True):
            correction[leaf.holds(x, y)] = value
        return correction

    def _points(self, steps: Floats, ranks: Floats) -> tuple[Floats, Floats]:
        """(pruning step, log rank) in the unit square; a step of a quarter or more is the far edge."""
        lowest, highest = math.log2(self._ranks[0]), math.log2(self._ranks[-1])
        y = (np.log2(ranks) - lowest) / (highest - lowest) if highest > lowest else np.zeros(len(ranks))
        return np.clip(4.0 * steps, 0.0, 1.0), np.clip(y, 0.0, 1.0)
