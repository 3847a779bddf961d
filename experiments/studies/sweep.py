"""Several comparisons that differ in one value, as a figure and a table: accuracy and time to a common target.

    .venv/bin/python experiments/studies/sweep.py --axis "Dirichlet alpha" --out label_skew.png \\
        0.3=runs/skew-0.3 1=runs/skew-1 10=runs/skew-10
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedspine.comparison import FILE
from fedspine.report.comparison_figures import new_figure, save_figure
from fedspine.report.comparison_tables import (
    Run,
    Table,
    by_method,
    common_target,
    half_width,
    interval,
    markdown_rows,
    seconds_to,
)
from fedspine.report.curves import COLOURS
from fedspine.report.records import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("comparisons", nargs="+", metavar="VALUE=DIR", help="outs of `fedspine compare`, in order")
    parser.add_argument("--axis", required=True, help="what VALUE is")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the table goes into FILE.md")
    options = parser.parse_args()
    if options.out.suffix != ".png":
        parser.error(f"--out {options.out}: must end in .png")
    found = {}
    for text in options.comparisons:
        value, _, directory = text.partition("=")
        if not (Path(directory) / FILE).is_file() or not directory:
            parser.error(f"{text}: write VALUE=DIR, where DIR is the --out of a finished `fedspine compare`")
        found[value] = json.loads((Path(directory) / FILE).read_text())["runs"]
    panels = panels_of(found)
    draw(panels, list(found), options.axis, options.out)
    write_atomically(options.out.with_suffix(".md"), table(panels, list(found), options.axis).encode())


@dataclass(frozen=True)
class Panel:
    """One figure: of every method, of every value, the seeds."""

    title: str
    unit: str
    seeds: Mapping[str, Mapping[str, Sequence[float]]]


def panels_of(found: Mapping[str, Sequence[Run]]) -> list[Panel]:
    """`found`: runs by value."""
    groups = {value: by_method(runs) for value, runs in found.items()}
    targets = {value: common_target(runs) for value, runs in found.items()}
    methods = dict.fromkeys(method for group in groups.values() for method in group)
    what: tuple[tuple[str, str, Callable[[str, Run], float | None]], ...] = (
        ("devices' own models", "accuracy", lambda _, run: run["summary"]["device_accuracy_mean"]),
        ("worst device", "accuracy", lambda _, run: run["summary"]["device_accuracy_min"]),
        (
            f"time to {', '.join(f'{target:.3f}' for target in targets.values())}",
            "virtual seconds",
            lambda value, run: seconds_to(run, targets[value]),
        ),
        ("waiting", "virtual seconds per device and round", lambda _, run: run["summary"]["mean_waiting_seconds"]),
    )

    def seeds(method: str, of: Callable[[str, Run], float | None]) -> dict[str, list[float]]:
        every = {value: [of(value, run) for run in group.get(method, [])] for value, group in groups.items()}
        return {value: [one for one in ones if one is not None] for value, ones in every.items() if ones}

    return [Panel(title, unit, {method: seeds(method, of) for method in methods}) for title, unit, of in what]


def draw(panels: Sequence[Panel], values: Sequence[str], axis: str, path: Path) -> None:
    """Means with 95 % intervals over seeds, a line per method."""
    figure = new_figure(14, 3.6)
    for place, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for colour, (method, seeds) in zip(COLOURS, panel.seeds.items(), strict=False):
            means = [float(np.mean(ones)) for ones in seeds.values()]
            halves = [half_width(ones) or 0.0 for ones in seeds.values()]
            place.errorbar([values.index(value) for value in seeds], means, halves, fmt="o-", ms=4, capsize=3, lw=1.3,
                           color=colour, label=method)  # fmt: skip
        place.set_xticks(range(len(values)), values)
        place.set(title=panel.title, xlabel=axis, ylabel=panel.unit)
        place.grid(alpha=0.3)
        place.spines[["top", "right"]].set_visible(False)
    place.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def table(panels: Sequence[Panel], values: Sequence[str], axis: str) -> str:
    """The same in Markdown, a row per figure and method."""
    rows = tuple(
        (
            f"{panel.title}, {panel.unit}",
            method,
            *(
                interval(seeds[value], 3 if panel.unit == "accuracy" else 1) if seeds.get(value) else "-"
                for value in values
            ),
        )
        for panel in panels
        for method, seeds in panel.seeds.items()
    )
    return "\n".join(markdown_rows(Table(axis, (axis, "method", *values), rows))) + "\n"


if __name__ == "__main__":
    main()
