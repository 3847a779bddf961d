"""A partition of the unit square that gets finer where samples fall: the space that S-UCB explores.

Source: FedSpine (arXiv 2501.02438), which partitions and progressively refines the (ratio, rank) space; the splitting
rule (late, longest side first) and its constants are reconstructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPLIT_AFTER = 4
SMALLEST_SIDE = 0.12

Point = tuple[float, float]


@dataclass(frozen=True)
class Leaf:
    """[low, high) in both coordinates; the upper edge of the square belongs to its last leaves."""

    low: Point
    high: Point
    samples: tuple[int, ...] = ()
    """Indices of the samples inside, oldest first."""

    def contains(self, point: Point) -> bool:
        (x, y), (left, bottom), (right, top) = point, self.low, self.high
        return left <= x and bottom <= y and (x < right or right >= 1.0) and (y < top or top >= 1.0)

    def holds(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
        """`contains` of many points at once."""
        inside = (self.low[0] <= x) & (self.low[1] <= y)
        for values, high in zip((x, y), self.high, strict=True):
            if high < 1.0:
                inside &= values < high
        return inside


def grow(points: Sequence[Point]) -> list[Leaf]:
    """The partition after samples at `points`, in order, from four quarters."""
    halves = ((0.0, 0.5), (0.5, 1.0))
    leaves = [Leaf((x[0], y[0]), (x[1], y[1])) for x in halves for y in halves]
    for index, point in enumerate(points):
        place = next(i for i, leaf in enumerate(leaves) if leaf.contains(point))
        leaf = Leaf(leaves[place].low, leaves[place].high, (*leaves[place].samples, index))
        leaves[place : place + 1] = _split(leaf, points)
    return leaves


def statistics(
    leaves: Sequence[Leaf], rewards: Sequence[float], discount: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(discounted count, discounted mean reward) of every leaf; the newest sample weighs 1."""
    total = len(rewards)
    counts = np.zeros(len(leaves))
    sums = np.zeros(len(leaves))
    for place, leaf in enumerate(leaves):
        for index in leaf.samples:
            weight = discount ** (total - 1 - index)
            counts[place] += weight
            sums[place] += weight * rewards[index]
    return counts, np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)


def _split(leaf: Leaf, points: Sequence[Point]) -> list[Leaf]:
    sides = [high - low for low, high in zip(leaf.low, leaf.high, strict=True)]
    axis = int(sides[1] > sides[0])
    if len(leaf.samples) < SPLIT_AFTER or sides[axis] <= SMALLEST_SIDE:
        return [leaf]
    middle = (leaf.low[axis] + leaf.high[axis]) / 2
    high, low = list(leaf.high), list(leaf.low)
    high[axis] = low[axis] = middle
    lower, upper = Leaf(leaf.low, (high[0], high[1])), Leaf((low[0], low[1]), leaf.high)
    inside = tuple(i for i in leaf.samples if lower.contains(points[i]))
    outside = tuple(i for i in leaf.samples if i not in inside)
    return [Leaf(lower.low, lower.high, inside), Leaf(upper.low, upper.high, outside)]
