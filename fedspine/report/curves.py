"""`curves.png`: accuracy, sparsity, ranks and round times of a run, over virtual or measured time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedspine.config import RunConfig
from fedspine.report.summary import accuracy_name
from fedspine.types import TRAINED, Pull, RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by colour-blind readers too (Okabe and Ito)."""


def draw_curves(records: Sequence[RoundRecord], config: RunConfig, device_types: Sequence[str], path: Path) -> None:
    """Four panels. `device_types`: name of every device's type."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _accuracy(axes[0, 0], records, config)
    _sparsity(axes[0, 1], records, device_types)
    _times(axes[1, 0], records, device_types, config)
    _ranks(axes[1, 1], records, device_types, config)
    for axis in axes.flat[1:3]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{config.method} (policy {config.policy}): {config.data.rstrip('/').rsplit('/', 1)[-1]}, "
        f"{config.devices} devices, {config.sampled} per round, seed {config.seed}",
        x=0.01,
        ha="left",
    )
    # Written beside and renamed, like every file of a run.
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)


def _accuracy(axis: Axes, records: Sequence[RoundRecord], config: RunConfig) -> None:
    unit, unit_name = (60, "minutes") if records[-1].clock_seconds > 600 else (1, "seconds")
    points = [
        (record.clock_seconds / unit, record.accuracy, record.smoothed_accuracy)
        for record in records
        if record.accuracy is not None and record.smoothed_accuracy is not None
    ]
    times, single, smoothed = zip(*points, strict=True)
    axis.plot(times, single, "o-", ms=3, lw=1, alpha=0.45, color=COLOURS[0], label="single rounds")
    axis.plot(times, smoothed, "o-", ms=4, lw=2, color=COLOURS[0], label="smoothed (averaged adapters)")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    if config.target_accuracy:
        axis.axhline(config.target_accuracy, color="grey", lw=1, ls="--")
        axis.annotate(f"target {config.target_accuracy:g}", (0, config.target_accuracy), va="bottom", color="grey")
    name = accuracy_name(config.task)
    axis.set(title=f"{name} of the global model", xlabel=f"{config.cost} time, {unit_name}", ylabel=name)


def _sparsity(axis: Axes, records: Sequence[RoundRecord], types: Sequence[str]) -> None:
    for colour, (name, pulls) in zip(COLOURS, _by_type(records, types), strict=False):
        axis.plot(
            [pull.round for pull in pulls],
            [100 * pull.ratio_after for pull in pulls],
            "o",
            ms=3.5,
            alpha=0.6,
            color=colour,
            label=name,
        )
    rounds = [record.round for record in records]
    axis.step(rounds, [100 * record.floor_ratio for record in records], where="mid", color="black", lw=1, label="floor")
    axis.set(title="sparsity of the sampled devices", xlabel="round", ylabel="% of prunable parameters")
    axis.legend(frameon=False, fontsize=8)


def _times(axis: Axes, records: Sequence[RoundRecord], types: Sequence[str], config: RunConfig) -> None:
    for colour, (_, pulls) in zip(COLOURS, _by_type(records, types), strict=False):
        axis.plot(
            [pull.round for pull in pulls],
            [pull.report.seconds for pull in pulls],
            "o",
            ms=3.5,
            alpha=0.6,
            color=colour,
        )
    rounds = [record.round for record in records]
    axis.plot(rounds, [record.round_seconds for record in records], color="black", lw=1, label="round (slowest device)")
    axis.set(
        title=f"{config.cost} time of a round and of its devices", xlabel="round", ylabel="seconds", ylim=(0, None)
    )
    axis.legend(frameon=False, fontsize=8)


def _ranks(axis: Axes, records: Sequence[RoundRecord], types: Sequence[str], config: RunConfig) -> None:
    ranks = sorted({pull.action.lora_rank for record in records for pull in record.pulls})
    groups = list(_by_type(records, types))
    width = 0.8 / max(1, len(groups))
    for number, (colour, (name, pulls)) in enumerate(zip(COLOURS, groups, strict=False)):
        shares = [100 * sum(pull.action.lora_rank == rank for pull in pulls) / len(pulls) for rank in ranks]
        offset = (number - (len(groups) - 1) / 2) * width
        axis.bar([index + offset for index in range(len(ranks))], shares, width, color=colour, label=name)
    axis.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axis.set(title=f"LoRA ranks that {config.policy} gave", xlabel="rank", ylabel="% of the device rounds")
    axis.legend(frameon=False, fontsize=8)


def _by_type(records: Sequence[RoundRecord], types: Sequence[str]) -> list[tuple[str, list[Pull]]]:
    """Finished device rounds by type of device, types in order of name."""
    groups: dict[str, list[Pull]] = {}
    for record in records:
        for pull in record.pulls:
            if pull.report.outcome == TRAINED:
                groups.setdefault(types[pull.device], []).append(pull)
    return sorted(groups.items())
