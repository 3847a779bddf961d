"""Contrasts between cells with intervals: a paired bootstrap over seeds, users and rows.

All cells of a seed answer the same held-out rows of the same users, so a contrast is a difference row by row. The
bootstrap draws seeds, in each of them users, and of each user rows, with replacement, so that none of the three counts
as more independent than it is; where nothing but rows differs, the interval is too wide by up to 1.7. P-values are
two-sided, from the share of draws on the other side of zero, and corrected over the contrasts that were declared (Holm,
Scand. J. Statist. 6, 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
LEVEL = 0.95
_SEED = 41

Floats = NDArray[np.float64]
Units = Sequence[Sequence[Floats]]
"""By seed and user: a value of every row, [rows]."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided, of no difference, not corrected."""
    seeds: int
    rows: int
    """Of all seeds and users together."""


def weighted(scores: Mapping[str, Mapping[int, Sequence[Sequence[float]]]], weights: Mapping[str, float]) -> Units:
    """The contrast row by row, in the seeds that all its cells have finished.

    `scores`: by cell and seed, of every user's rows. Cells with as many users and rows are taken to answer the same.
    """
    seeds = sorted(set.intersection(*(set(scores[cell]) for cell in weights)))
    units = []
    for seed in seeds:
        users = zip(*(scores[cell][seed] for cell in weights), strict=True)
        units.append([np.asarray(list(weights.values())) @ np.asarray(rows) for rows in users])
    return units


def bootstrap(units: Units) -> Interval | None:
    """Mean over seeds of the mean over users of the mean over rows; None without any seed. The same for the same units.

    Several tasks are several groups of users; see `join`.
    """
    if not units:
        return None
    rng = np.random.default_rng(_SEED)
    means = np.empty((DRAWS, len(units)))
    for number, users in enumerate(units):
        of_users = np.stack([rows[rng.integers(len(rows), size=(DRAWS, len(rows)))].mean(1) for rows in users], axis=1)
        drawn = rng.integers(len(users), size=(DRAWS, len(users)))
        means[:, number] = np.take_along_axis(of_users, drawn, 1).mean(1)
    seeds = rng.integers(len(units), size=(DRAWS, len(units)))
    values = np.take_along_axis(means, seeds, 1).mean(1)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    other = min((values <= 0).sum(), (values >= 0).sum())
    return Interval(
        mean=float(np.mean([np.mean([rows.mean() for rows in users]) for users in units])),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (int(other) + 1) / (DRAWS + 1)),
        seeds=len(units),
        rows=sum(len(rows) for users in units for rows in users),
    )


def join(parts: Sequence[Units]) -> Units:
    """Contrasts of several tasks as one: their users side by side, in the seeds that all have."""
    return [[rows for part in seeds for rows in part] for seeds in zip(*parts, strict=False)]


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number, in the order given."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected
