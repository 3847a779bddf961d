"""Several comparisons that differ in one value, as one figure: accuracy and time to a common target over that value.

    .venv/bin/python experiments/studies/sweep.py --axis "Dirichlet alpha" --out label_skew.png \\
        0.3=runs/skew-0.3 1=runs/skew-1 10=runs/skew-10
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedspine.comparison import FILE
from fedspine.report.comparison_figures import new_figure, save_figure
from fedspine.report.comparison_tables import Run, by_method, common_target, half_width, seconds_to
from fedspine.report.curves import COLOURS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("comparisons", nargs="+", metavar="VALUE=DIR", help="outs of `fedspine compare`, in order")
    parser.add_argument("--axis", required=True, help="what VALUE is")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args()
    found = {}
    for text in options.comparisons:
        value, _, directory = text.partition("=")
        found[value] = json.loads((Path(directory) / FILE).read_text())["runs"]
    draw(found, options.axis, options.out)


def draw(found: Mapping[str, Sequence[Run]], axis: str, path: Path) -> None:
    """Means with 95 % intervals over seeds, a line per method; `found`: runs by value."""
    targets = {value: common_target(runs) for value, runs in found.items()}
    panels: tuple[tuple[str, str, Callable[[str, Run], Any]], ...] = (
        ("devices' own models", "accuracy", lambda _, run: run["summary"]["device_accuracy_mean"]),
        ("worst device", "accuracy", lambda _, run: run["summary"]["device_accuracy_min"]),
        (
            f"time to {', '.join(f'{target:.3f}' for target in targets.values())}",
            "virtual seconds",
            lambda value, run: seconds_to(run, targets[value]),
        ),
        ("waiting", "virtual seconds per device and round", lambda _, run: run["summary"]["mean_waiting_seconds"]),
    )
    figure = new_figure(14, 3.6)
    for place, (title, label, of) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        methods = dict.fromkeys(method for runs in found.values() for method in by_method(runs))
        for colour, method in zip(COLOURS, methods, strict=False):
            groups = [(number, by_method(found[value]).get(method, []), value) for number, value in enumerate(found)]
            values = [(number, [of(value, run) for run in runs]) for number, runs, value in groups if runs]
            halves = [half_width(seeds) or 0.0 for _, seeds in values]
            means = [float(np.mean(seeds)) for _, seeds in values]
            place.errorbar([number for number, _ in values], means, halves, fmt="o-", ms=4, capsize=3, lw=1.3,
                           color=colour, label=method)  # fmt: skip
        place.set_xticks(range(len(found)), list(found))
        place.set(title=title, xlabel=axis, ylabel=label)
        place.grid(alpha=0.3)
        place.spines[["top", "right"]].set_visible(False)
    place.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


if __name__ == "__main__":
    main()
