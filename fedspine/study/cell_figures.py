"""What every finished cell reached and cost, by the protocols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedspine.study.design import Point, Study
from fedspine.study.evidence import Evidence, cell_of
from fedspine.study.metrics import score_of
from fedspine.study.protocols import Budget, cost_to_target, quality_under_budget, restricted_mean_seconds, slowed


@dataclass(frozen=True)
class CellFigures:
    """Means over the seeds of a cell."""

    name: str
    levels: Point
    value: float
    seconds: float
    """Of one device."""
    traffic_bytes: float
    """Both ways."""
    memory_bytes: float
    within: dict[str, float | None]
    """Best value within so many seconds of the device; None where a seed has none."""
    seconds_to_target: float | None
    """Restricted mean; None without a target."""
    reached: int
    """Seeds that reached the target."""
    slower: float | None
    """Relative change of the value within half of the longest time, on a device of half the speed."""


def figures(study: Study, evidence: Evidence) -> Iterator[CellFigures]:
    """Of all finished cells, in the order of the points."""
    longest = max(seed["trace"][-1]["device_seconds"] for seeds in evidence.of_cell.values() for seed in seeds.values())
    for name in dict.fromkeys(cell_of(point) for point in evidence.points):
        traces = [result["trace"] for _, result in sorted(evidence.of_cell[name].items())]
        levels = next(iter(evidence.of_cell[name].values()))["levels"]
        goal = score_of(study.metric, study.target)
        costs = [cost_to_target(trace, goal) for trace in traces] if study.target else []
        within = {f"{longest * part:.3g} s": Budget(seconds=longest * part) for part in (0.25, 0.5, 1.0)}
        changes = [slowed(trace, Budget(seconds=longest / 2), slowdown=2.0) for trace in traces]
        yield CellFigures(
            name=name,
            levels=levels,
            value=fmean(trace[-1]["value"] for trace in traces),
            seconds=fmean(trace[-1]["device_seconds"] for trace in traces),
            traffic_bytes=fmean(trace[-1]["upload_bytes"] + trace[-1]["download_bytes"] for trace in traces),
            memory_bytes=max(trace[-1]["peak_memory_bytes"] for trace in traces),
            within={
                text: _mean([quality_under_budget(trace, budget).value for trace in traces])
                for text, budget in within.items()
            },
            seconds_to_target=restricted_mean_seconds(costs)[0] if costs else None,
            reached=sum(not cost.censored for cost in costs),
            slower=_mean(changes),
        )


def _mean(values: Sequence[float | None]) -> float | None:
    """None when one of them is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
