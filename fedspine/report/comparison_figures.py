"""Figures of a comparison: accuracy over virtual time, and what each method needed to the common target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from fedspine.report.comparison_tables import Run, View, by_method, half_width, seconds_to, target_of, traffic
from fedspine.report.curves import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("-", "--", ":", "-.")
FEW = 6
"""Methods up to which the single seeds are drawn too."""
WIDE = 20
"""Times, from which on costs are on a logarithmic axis."""
LABEL = 30
"""Letters of a method's name in a line."""


def draw_comparison(runs: Sequence[Run], directory: Path, view: View | None = None) -> None:
    """`curves.png` and `costs.png`, one colour and line style per method."""
    groups = by_method(runs)
    figure = new_figure(8, max(4.5, 0.8 + 0.17 * len(groups)))  # the legend's height
    draw_accuracy(figure.subplots(), groups)
    save_figure(figure, directory / "curves.png")
    figure = new_figure(11, 1.2 + 0.42 * len(groups))
    axes = figure.subplots(1, 4, sharey=True)
    target = target_of(runs, view or View())
    draw_bars(axes[0], groups, [[100 * run["summary"]["device_accuracy_mean"] for run in g] for g in groups.values()])
    axes[0].set(title="devices' own models", xlabel="accuracy, %")
    axes[0].set_xlim(left=max(0.0, axes[0].get_xlim()[0]))
    draw_costs(axes[1], groups, [[seconds_to(run, target) or np.nan for run in g] for g in groups.values()])
    axes[1].set(title=f"time to {target:.3f}", xlabel="virtual seconds")
    draw_costs(axes[2], groups, [[run["summary"]["mean_waiting_seconds"] for run in g] for g in groups.values()])
    axes[2].set(title="waiting", xlabel="virtual s per device, round")
    draw_costs(axes[3], groups, [[traffic(run) / 1e6 for run in g] for g in groups.values()])
    axes[3].set(title="traffic", xlabel="MB, both ways")
    save_figure(figure, directory / "costs.png")


def draw_accuracy(axis: Axes, groups: Mapping[str, Sequence[Run]]) -> None:
    """Mean over seeds of accuracy and time at every evaluated round; of a few methods, the seeds faintly beside it."""
    longest = max(run["curve"][-1]["clock_seconds"] for group in groups.values() for run in group)
    unit, unit_name = (60, "minutes") if longest > 600 else (1, "seconds")
    for number, (name, group) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        curves = [
            [(point["clock_seconds"] / unit, point["smoothed_accuracy"]) for point in run["curve"]] for run in group
        ]
        for curve in curves if len(group) > 1 and len(groups) <= FEW else ():
            axis.plot(*zip(*curve, strict=True), lw=0.8, alpha=0.35, color=colour)
        mean = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)
        axis.plot(*mean.T, STYLES[number // len(COLOURS) % len(STYLES)], lw=1.6, color=colour, label=name)
    axis.set(
        title="smoothed accuracy of the global model",
        xlabel=f"virtual time, {unit_name}",
        ylabel="accuracy",
    )
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw_bars(axis: Axes, groups: Mapping[str, Sequence[Run]], values: Sequence[Sequence[float]]) -> None:
    """A dot per seed, the mean with its interval, methods from top to bottom; NaN where a target was not reached.

    A dotted line goes down from the first method's mean, with which the tables compare the others.
    """
    for number, seeds in enumerate(values):
        colour = COLOURS[number % len(COLOURS)]
        reached = [value for value in seeds if np.isfinite(value)]
        axis.plot(reached, [number] * len(reached), "o", ms=3, alpha=0.45, color=colour)
        if reached:
            half = half_width(reached) or 0.0
            axis.errorbar(np.mean(reached), number, xerr=half, fmt="D", ms=5, capsize=3, color=colour)
            if number == 0:
                axis.axvline(float(np.mean(reached)), ls=":", lw=1, color=colour, alpha=0.6)
        if len(reached) < len(seeds):
            text = f"{len(reached)} of {len(seeds)} " if reached else "not reached"
            axis.text(0.99, number, text, transform=axis.get_yaxis_transform(), ha="right", va="center", fontsize=8)
    axis.set_yticks(range(len(groups)), [fill(name, LABEL) for name in groups])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.grid(alpha=0.3, axis="x")
    axis.spines[["top", "right"]].set_visible(False)


def draw_costs(axis: Axes, groups: Mapping[str, Sequence[Run]], values: Sequence[Sequence[float]]) -> None:
    """As `draw_bars`, from zero; where costs differ by more than `WIDE` times, on a logarithmic axis."""
    draw_bars(axis, groups, values)
    known = [value for seeds in values for value in seeds if np.isfinite(value)]
    if known and max(known) > WIDE * min(known) > 0:
        axis.set(xscale="log", xlim=(min(known) / 2, max(known) * 2))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    else:
        axis.set_xlim(left=0)


def new_figure(width: float, height: float) -> Figure:
    """In inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
