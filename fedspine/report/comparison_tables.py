"""Tables of a comparison: means with 95 % intervals over seeds, and paired differences to the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from fedspine.report.summary import crossing

Run = Mapping[str, Any]
"""Method, seed, summary and curve: what `fedspine.comparison.collect` finds."""
LEVEL = 0.95


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> list[str]:
        """Lines, with a heading."""
        rows = ["| " + " | ".join(row) + " |" for row in (self.header, *self.rows)]
        return [f"## {self.title}", "", rows[0], "|" + "---|" * len(self.header), *rows[1:]]


def tables(runs: Sequence[Run]) -> tuple[Table, Table]:
    """Accuracy, and cost. The reference is the first method; seeds that a method lacks leave its differences."""
    groups = by_method(runs)
    return _accuracy_table(groups), _cost_table(groups, common_target(runs))


def as_markdown(runs: Sequence[Run]) -> str:
    """All of it as a page."""
    lines = [
        "Mean ± 95 % interval over seeds (Student's t). Differences and ratios are paired by seed, against "
        f"`{next(iter(by_method(runs)))}`; *not separable* where the interval holds no difference. Times are virtual: "
        "those of the devices.",
    ]
    for table in tables(runs):
        lines += ["", *table.markdown()]
    return "\n".join(lines) + "\n"


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by method, in the order of their first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["method"], []).append(run)
    return groups


def common_target(runs: Sequence[Run]) -> float:
    """The highest smoothed accuracy that every run reached, rounded down to half a point."""
    worst: float = min(max(point["smoothed_accuracy"] for point in run["curve"]) for run in runs)
    return math.floor(worst * 200) / 200


def seconds_to(run: Run, target: float) -> float | None:
    """Virtual seconds until the smoothed accuracy crosses the target."""
    return crossing([(point["clock_seconds"], point["smoothed_accuracy"]) for point in run["curve"]], target)


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of a mean; None of a single value."""
    if len(values) < 2:
        return None
    quantile: float = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1)
    return quantile * float(stats.sem(values))


def interval(values: Sequence[float], digits: int = 3, unit: float = 1.0) -> str:
    """Mean ± half width, in units of `unit`."""
    scaled = [value / unit for value in values]
    half = half_width(scaled)
    mean = sum(scaled) / len(scaled)
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def paired_difference(group: Sequence[Run], reference: Sequence[Run], key: str) -> str:
    """Of a figure of the summaries, in points (hundredths)."""
    differences = [100 * difference for difference in _paired(group, reference, lambda run: run["summary"][key])]
    if not differences:
        return "no common seed"
    half, mean = half_width(differences), sum(differences) / len(differences)
    if half is None:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ± {half:.1f}" + ("" if abs(mean) > half else ", not separable")


def paired_ratio(group: Sequence[Run], reference: Sequence[Run], of: Callable[[Run], float | None]) -> str:
    """Reference over method: how many times less the method needs, as geometric mean with its interval."""
    try:
        logs = _paired(reference, group, lambda run: math.log(of(run) or math.nan))
    except ValueError:
        return "-"
    logs = [value for value in logs if math.isfinite(value)]
    if not logs:
        return "-"
    half, mean = half_width(logs), sum(logs) / len(logs)
    if half is None:
        return f"{math.exp(mean):.2f}x"
    text = f"{math.exp(mean):.2f}x ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
    return text if abs(mean) > half else text + ", not separable"


def _paired(group: Sequence[Run], reference: Sequence[Run], of: Callable[[Run], float]) -> list[float]:
    """of(group) - of(reference) by seed."""
    other = {run["seed"]: of(run) for run in reference}
    return [of(run) - other[run["seed"]] for run in group if run["seed"] in other]


def _accuracy_table(groups: Mapping[str, Sequence[Run]]) -> Table:
    reference = next(iter(groups))
    rows = [
        (
            name,
            str(len(group)),
            f"{100 * min(_column(group, 'sparsity_prunable')):.0f} %",
            interval(_column(group, "device_accuracy_mean")),
            f"{min(_column(group, 'device_accuracy_min')):.3f}",
            interval(_column(group, "smoothed_accuracy")),
            "" if name == reference else paired_difference(group, groups[reference], "device_accuracy_mean"),
        )
        for name, group in groups.items()
    ]
    header = ("method", "seeds", "prunable cut", "devices, mean", "worst device", "global, smoothed", "points")
    return Table(f"Accuracy; points: the devices' mean against {reference}", header, tuple(rows))


def _cost_table(groups: Mapping[str, Sequence[Run]], target: float) -> Table:
    reference = next(iter(groups))
    rows = []
    for name, group in groups.items():
        reached = [seconds for run in group if (seconds := seconds_to(run, target)) is not None]
        traffic = [run["summary"]["uploaded_bytes"] + run["summary"]["downloaded_bytes"] for run in group]
        faster = paired_ratio(group, groups[reference], lambda run: seconds_to(run, target))
        rows.append(
            (
                name,
                interval(reached, 1),
                "" if name == reference else faster,
                interval(_column(group, "virtual_seconds"), 1),
                interval(_column(group, "mean_waiting_seconds"), 2),
                interval(traffic, 1, 1e6),
                f"{max(_column(group, 'device_memory_bytes')) / 1e6:.0f}",
            )
        )
    header = ("method", "s to target", "faster", "s in all", "s waiting", "MB traffic", "MB memory")
    title = (
        f"Cost; target: a smoothed accuracy of {target:.3f}, which every run reached; faster: against {reference}; "
        "waiting: per device and round; memory: the largest need of a device, estimated"
    )
    return Table(title, header, tuple(rows))


def _column(group: Sequence[Run], key: str) -> list[float]:
    return [float(run["summary"][key]) for run in group]
