"""Figures of a comparison: accuracy over virtual time, and what each method needed to the common target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedspine.report.comparison_tables import Run, by_method, common_target, half_width, seconds_to
from fedspine.report.curves import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("-", "--", ":", "-.")


def draw_comparison(runs: Sequence[Run], directory: Path) -> None:
    """`curves.png` and `costs.png`, one colour and line style per method."""
    groups = by_method(runs)
    figure = new_figure(8, 4.5)
    _curves(figure.subplots(), groups)
    _save(figure, directory / "curves.png")
    figure = new_figure(11, 1.2 + 0.42 * len(groups))
    axes = figure.subplots(1, 4, sharey=True)
    target = common_target(runs)
    _bars(axes[0], groups, [[100 * run["summary"]["device_accuracy_mean"] for run in g] for g in groups.values()])
    axes[0].set(title="devices' own models", xlabel="accuracy, %")
    axes[0].set_xlim(left=max(0.0, axes[0].get_xlim()[0]))
    _bars(axes[1], groups, [[seconds_to(run, target) or np.nan for run in g] for g in groups.values()])
    axes[1].set(title=f"time to {target:.3f}", xlabel="virtual seconds", xlim=(0, None))
    _bars(axes[2], groups, [[run["summary"]["mean_waiting_seconds"] for run in g] for g in groups.values()])
    axes[2].set(title="waiting", xlabel="virtual seconds per device and round", xlim=(0, None))
    traffic = [
        [(run["summary"]["uploaded_bytes"] + run["summary"]["downloaded_bytes"]) / 1e6 for run in g]
        for g in groups.values()
    ]
    _bars(axes[3], groups, traffic)
    axes[3].set(title="traffic", xlabel="MB, both ways", xlim=(0, None))
    _save(figure, directory / "costs.png")


def _curves(axis: Axes, groups: Mapping[str, Sequence[Run]]) -> None:
    longest = max(run["curve"][-1]["clock_seconds"] for group in groups.values() for run in group)
    unit, unit_name = (60, "minutes") if longest > 600 else (1, "seconds")
    for number, (name, group) in enumerate(groups.items()):
        for run in group:
            axis.plot(
                [point["clock_seconds"] / unit for point in run["curve"]],
                [point["smoothed_accuracy"] for point in run["curve"]],
                STYLES[number // len(COLOURS) % len(STYLES)],
                lw=1.3,
                color=COLOURS[number % len(COLOURS)],
                label=name if run is group[0] else None,
            )
    axis.set(
        title="smoothed accuracy of the global model, one line per seed",
        xlabel=f"virtual time, {unit_name}",
        ylabel="accuracy",
    )
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(axis: Axes, groups: Mapping[str, Sequence[Run]], values: Sequence[Sequence[float]]) -> None:
    """A dot per seed, the mean with its interval, methods from top to bottom."""
    for number, seeds in enumerate(values):
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(seeds, [number] * len(seeds), "o", ms=3, alpha=0.45, color=colour)
        axis.errorbar(np.mean(seeds), number, xerr=half_width(seeds) or 0.0, fmt="D", ms=5, capsize=3, color=colour)
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.grid(alpha=0.3, axis="x")
    axis.spines[["top", "right"]].set_visible(False)


def new_figure(width: float, height: float) -> Figure:
    """In inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
