"""Tables of a comparison: means with 95 % intervals over seeds, and paired differences to the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from fedspine.report.summary import crossing

Run = Mapping[str, Any]
"""Method, seed, summary and curve: what `fedspine.comparison.collect` finds."""
LEVEL = 0.95
_NEVER = "not reached"


@dataclass(frozen=True)
class View:
    """How runs are put side by side."""

    target: float | None = None
    """Smoothed accuracy, at the final sparsity, whose time is compared; None: the highest that every run reached."""
    baseline: str = ""
    """Method whose costs are 100 %; empty: the reference."""
    inference: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """`BenchResult.ratios` of a method's model over the baseline's, by method; empty where not measured."""


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> list[str]:
        """Lines, with a heading."""
        return [f"## {self.title}", "", *markdown_rows(self)]


def tables(runs: Sequence[Run], view: View | None = None) -> tuple[Table, ...]:
    """Accuracy, cost, relative cost. The reference is the first method; seeds it lacks leave the differences."""
    groups, view = by_method(runs), view or View()
    target = target_of(runs, view)
    return accuracy_table(groups), _cost_table(groups, target), relative_table(groups, target, view)


def as_markdown(runs: Sequence[Run], view: View | None = None) -> str:
    """All of it as a page."""
    lines = [
        "Mean ± 95 % interval over seeds (Student's t). Differences and ratios are paired by seed, against "
        f"`{next(iter(by_method(runs)))}`; *not separable* where the interval holds no difference. Times are virtual: "
        "those of the devices.",
    ]
    for table in tables(runs, view):
        lines += ["", *table.markdown()]
    return "\n".join(lines) + "\n"


def markdown_rows(table: Table) -> list[str]:
    """Its lines, without the title."""
    header, *rows = ("| " + " | ".join(row) + " |" for row in (table.header, *table.rows))
    return [header, "|" + "---|" * len(table.header), *rows]


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by method, in the order of their first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["method"], []).append(run)
    return groups


def common_target(runs: Sequence[Run]) -> float:
    """The highest smoothed accuracy that every run reached at its final sparsity, rounded down to half a point."""
    worst: float = min(max(accuracy for _, accuracy in _when_cut(run)) for run in runs)
    return math.floor(worst * 200) / 200


def target_of(runs: Sequence[Run], view: View) -> float:
    """The accuracy whose time is compared."""
    return common_target(runs) if view.target is None else view.target


def seconds_to(run: Run, target: float) -> float | None:
    """Virtual seconds until a model that is cut as far as it will be has the target as its smoothed accuracy."""
    return crossing(_when_cut(run), target)


def _when_cut(run: Run) -> list[tuple[float, float]]:
    """(virtual seconds, smoothed accuracy) from when the run's final sparsity is reached: equal sparsity compares."""
    final = run["curve"][-1]["floor_ratio"]
    return [
        (point["clock_seconds"], point["smoothed_accuracy"])
        for point in run["curve"]
        if point["floor_ratio"] >= final - 1e-9
    ]


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
    logs, seeds = _log_ratios(reference, group, of)
    if not logs:
        return _NEVER if seeds else "no common seed"
    mean, half = sum(logs) / len(logs), half_width(logs)
    if half is None:
        return f"{math.exp(mean):.2f}x{_of_seeds(logs, seeds)}"
    text = f"{math.exp(mean):.2f}x ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
    return text + ("" if abs(mean) > half else ", not separable") + _of_seeds(logs, seeds)


def paired_percent(group: Sequence[Run], baseline: Sequence[Run], of: Callable[[Run], float | None]) -> str:
    """Method over baseline in percent, as geometric mean with its interval."""
    logs, seeds = _log_ratios(group, baseline, of)
    if not logs:
        return _NEVER if seeds else "no common seed"
    mean, half = sum(logs) / len(logs), half_width(logs)
    low, middle, high = (f"{100 * math.exp(mean + side * (half or 0.0)):.0f}" for side in (-1, 0, 1))
    return (f"{middle} %" if low == high else f"{middle} % ({low} to {high})") + _of_seeds(logs, seeds)


def reached_text(group: Sequence[Run], target: float) -> str:
    """Seconds to the target, and how many seeds reached it if not all did."""
    reached = [seconds for run in group if (seconds := seconds_to(run, target)) is not None]
    if not reached:
        return _NEVER
    return interval(reached, 1) + _of_seeds(reached, len(group))


def _of_seeds(found: Sequence[float], seeds: int) -> str:
    return "" if len(found) == seeds else f" ({len(found)} of {seeds} seeds)"


def _log_ratios(
    above: Sequence[Run], below: Sequence[Run], of: Callable[[Run], float | None]
) -> tuple[list[float], int]:
    """Logarithms of above / below by seed, where both have the figure, and how many seeds they have in common."""
    logs = _paired(above, below, lambda run: math.log(of(run) or math.nan))
    return [value for value in logs if math.isfinite(value)], len(logs)


def _paired(group: Sequence[Run], reference: Sequence[Run], of: Callable[[Run], float]) -> list[float]:
    """of(group) - of(reference) by seed."""
    other = {run["seed"]: of(run) for run in reference}
    return [of(run) - other[run["seed"]] for run in group if run["seed"] in other]


def accuracy_table(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Of the devices' own models and of the server's; points are hundredths."""
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
        faster = paired_ratio(group, groups[reference], lambda run: seconds_to(run, target))
        rows.append(
            (
                name,
                reached_text(group, target),
                "" if name == reference else faster,
                interval(_column(group, "virtual_seconds"), 1),
                interval(_column(group, "mean_waiting_seconds"), 2),
                interval([traffic(run) for run in group], 1, 1e6),
                f"{max(_column(group, 'device_memory_bytes')) / 1e6:.0f}",
            )
        )
    header = ("method", "s to target", "faster", "s in all", "s waiting", "MB traffic", "MB memory")
    by_all = all(seconds_to(run, target) is not None for group in groups.values() for run in group)
    title = (
        f"Cost; target: a smoothed accuracy of {target:.3f} at the final sparsity"
        f"{', which every run reached' if by_all else ''}; faster: "
        f"against {reference}; waiting: per device and round; memory: the largest need of a device, estimated"
    )
    return Table(title, header, tuple(rows))


def relative_table(groups: Mapping[str, Sequence[Run]], target: float, view: View) -> Table:
    """Training in virtual time and by the cost formulas; inference as measured here on the cut models."""
    baseline = view.baseline or next(iter(groups))
    figures: tuple[tuple[str, Callable[[Run], float | None]], ...] = (
        ("time to target", lambda run: seconds_to(run, target)),
        ("time in all", lambda run: run["summary"]["virtual_seconds"]),
        ("traffic", traffic),
        ("training memory", lambda run: run["summary"]["device_memory_bytes"]),
    )
    measured = next(iter(view.inference.values()), None)
    batches = [row["batch"] for row in measured["latency"]] if measured else []
    header = ["method", *(title for title, _ in figures), *(f"inference time, batch {batch}" for batch in batches)]
    rows = []
    for name, group in groups.items():
        row = [name, *(paired_percent(group, groups[baseline], of) for _, of in figures)]
        if measured:
            row += _inference_cells(view.inference.get(name), len(batches), name == baseline)
        rows.append(tuple(row))
    title = f"Relative cost, {baseline} = 100 %" + (
        "; inference: measured on the models of the first seed" if measured else ""
    )
    return Table(title, (*header, *(("inference memory",) if measured else ())), tuple(rows))


def _inference_cells(ratios: Mapping[str, Any] | None, batches: int, baseline: bool) -> list[str]:
    if baseline:
        return ["100 %"] * (batches + 1)
    if ratios is None:
        return ["-"] * (batches + 1)
    values = [*(row["p50"] for row in ratios["latency"]), ratios["peak_memory"]]
    return ["-" if value is None else f"{100 * value:.0f} %" for value in values]


def traffic(run: Run) -> float:
    """Bytes of a run, both ways."""
    return float(run["summary"]["uploaded_bytes"] + run["summary"]["downloaded_bytes"])


def _column(group: Sequence[Run], key: str) -> list[float]:
    return [float(run["summary"][key]) for run in group]
