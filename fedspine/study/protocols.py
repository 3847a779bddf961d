"""What a learning curve is worth on a device: quality under a budget, cost to a target, robustness.

The names are those of EdgeFlowerTune (arXiv 2605.08636), whose formulas are not published; these are ours. All are pure
functions of traces (`fedspine.study.tuning.Trace`), so that they need no run of their own. Where the best of several
points is taken, the held-out rows have chosen it: compare learners with equally many points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

Points = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Budget:
    """What a device may spend. Infinite: no limit."""

    seconds: float = inf
    bytes: float = inf
    """Both ways."""
    memory_bytes: float = inf
    energy_joules: float = inf


@dataclass(frozen=True)
class Quality:
    """The best value within a budget."""

    value: float | None
    """None when no point is within it."""
    violated: str = ""
    """What the first point had too much of then; `energy_joules` too where it was not measured."""


@dataclass(frozen=True)
class Cost:
    """What it took to reach a target."""

    seconds: float
    bytes: float
    censored: bool
    """Not reached: it takes more than this."""


def quality_under_budget(trace: Points, budget: Budget) -> Quality:
    """The best value at any point that is within the budget in every resource."""
    values = [point["value"] for point in trace if not _violated(point, budget)]
    return Quality(max(values)) if values else Quality(None, _violated(trace[0], budget))


def cost_to_target(trace: Points, target: float, sustained: int = 1) -> Cost:
    """At the first of `sustained` points in a row with at least the target; else that of the last point, censored."""
    for index in range(len(trace) - sustained + 1):
        if all(point["value"] >= target for point in trace[index : index + sustained]):
            return Cost(trace[index]["device_seconds"], _bytes(trace[index]), False)
    return Cost(trace[-1]["device_seconds"], _bytes(trace[-1]), True)


def restricted_mean_seconds(costs: Sequence[Cost]) -> tuple[float, float]:
    """(mean of the seconds up to a horizon, the horizon): the least that a censored run is known to need, or the most.

    Runs that did not reach the target count with the horizon. Leaving them out would reward learners that often fail.
    """
    censored = [cost.seconds for cost in costs if cost.censored]
    horizon = min(censored) if censored else max(cost.seconds for cost in costs)
    return sum(min(cost.seconds, horizon) for cost in costs) / len(costs), horizon


@dataclass(frozen=True)
class Change:
    """Of a perturbed run against its clean twin, as shares of the twin's; None where that has 0."""

    value: float | None
    seconds: float | None
    bytes: float | None
    value_in_time: float | None
    """Of the best value within the seconds that the twin took; None when there is none by then."""


def robustness(trace: Points, clean: Points) -> Change:
    """Relative change of the last point's value and cost under a perturbation; `clean`: the same cell and seed without.

    A value below 0 (minus an error) changes by its distance, so that less is worse there too.
    """
    last, twin = trace[-1], clean[-1]
    in_time = quality_under_budget(trace, Budget(seconds=twin["device_seconds"])).value
    return Change(
        _relative(last["value"], twin["value"]),
        _relative(last["device_seconds"], twin["device_seconds"]),
        _relative(_bytes(last), _bytes(twin)),
        None if in_time is None else _relative(in_time, twin["value"]),
    )


def slowed(trace: Points, budget: Budget, slowdown: float = 1.0, memory_share: float = 1.0) -> float | None:
    """Relative change of the quality under a budget when the device is so many times slower, or has less memory.

    -1 when nothing is within the budget any more; None when nothing was.
    """
    clean = quality_under_budget(trace, budget).value
    if not clean:
        return None
    harder = replace(budget, seconds=budget.seconds / slowdown, memory_bytes=budget.memory_bytes * memory_share)
    value = quality_under_budget(trace, harder).value
    return -1.0 if value is None else (value / clean - 1.0) * (1 if clean > 0 else -1)


def _relative(now: float, before: float) -> float | None:
    return (now - before) / abs(before) if before else None


def _violated(point: Mapping[str, Any], budget: Budget) -> str:
    """The first resource of which a point has spent too much; empty when it is within the budget."""
    spent = {
        "seconds": point["device_seconds"],
        "bytes": _bytes(point),
        "memory_bytes": point["peak_memory_bytes"],
        "energy_joules": point["energy_joules"],
    }
    for resource, amount in spent.items():
        limit = getattr(budget, resource)
        if limit < inf and (amount is None or amount > limit):
            return resource
    return ""


def _bytes(point: Mapping[str, Any]) -> float:
    return float(point["upload_bytes"] + point["download_bytes"])
