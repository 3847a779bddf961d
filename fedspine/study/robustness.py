"""How much worse and dearer cells become under a perturbation: each against its clean twin, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspine.study.design import Point, canonical
from fedspine.study.evidence import Evidence, cell_of
from fedspine.study.protocols import robustness
from fedspine.study.run import Result
from fedspine.study.statistics import Floats, Interval, bootstrap


@dataclass(frozen=True)
class Robustness:
    """Relative changes, as means over the seeds that both have finished; None where a seed has none."""

    levels: Point
    cells: tuple[str, str]
    """Names of the perturbed one and of its twin."""
    value: Interval | None
    """Paired row by row."""
    seconds: Interval | None
    bytes: Interval | None
    value_in_time: Interval | None
    """Of the best value within the seconds that the twin took."""


def robust(evidence: Evidence) -> list[Robustness]:
    """Of every finished cell with a perturbation whose twin is finished too, in the order of the points."""
    found: dict[str, Robustness] = {}
    for point in evidence.points:
        seen = canonical(point)
        if seen.get("perturbation") in (None, "none"):
            continue
        cells = cell_of(point), cell_of({**point, "perturbation": "none"})
        perturbed, clean = (evidence.of_cell.get(cell, {}) for cell in cells)
        seeds = sorted(set(perturbed) & set(clean))
        if seeds:
            found[cells[0]] = _against(
                seen, cells, [perturbed[seed] for seed in seeds], [clean[seed] for seed in seeds]
            )
    return list(found.values())


def _against(levels: Point, cells: tuple[str, str], perturbed: Sequence[Result], clean: Sequence[Result]) -> Robustness:
    pairs = list(zip(perturbed, clean, strict=True))
    changes = [robustness(result["trace"], twin["trace"]) for result, twin in pairs]
    rows = [_by_row(result, twin) for result, twin in pairs] if all(twin["value"] for twin in clean) else []
    return Robustness(
        levels,
        cells,
        value=bootstrap(rows),
        seconds=_over_seeds([change.seconds for change in changes]),
        bytes=_over_seeds([change.bytes for change in changes]),
        value_in_time=_over_seeds([change.value_in_time for change in changes]),
    )


def _by_row(result: Result, twin: Result) -> list[Floats]:
    """By user, the rows' part in the relative change of the seed's value."""
    scale = abs(twin["value"])
    both = zip(result["scores"], twin["scores"], strict=True)
    return [(np.asarray(now) - np.asarray(before)) / scale for now, before in both]


def _over_seeds(changes: Sequence[float | None]) -> Interval | None:
    """Where a seed is one number, the interval is over seeds alone."""
    known = [[np.array([change])] for change in changes if change is not None]
    return bootstrap(known) if len(known) == len(changes) else None
