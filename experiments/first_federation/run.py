"""The first federation: FedSpine, its faithful form and unpruned FedAvg on SST-2, three seeds.

    .venv/bin/python experiments/first_federation/run.py [--out runs/first_federation] [--parallel 2]

Writes results.json, table.md and curves.png beside this file. Finished runs are not run again, killed ones continue.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from grid import Cell, by_name, collect, column, commits, interval, markdown, run_all  # noqa: E402

from fedspine.report.curves import COLOURS  # noqa: E402

METHODS = ("fedavg", "fedspine", "fedspine-paper")
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/first_federation"), help="where the runs go")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one process each")
    parser.add_argument("--table", action="store_true", help="only the table and the figure, from results.json")
    options = parser.parse_args()
    results = HERE / "results.json"
    if not options.table:
        cells = [
            Cell(method, HERE / "sst2.toml", (f"method={method}", *_unpruned(method)), seed)
            for seed in SEEDS
            for method in METHODS
        ]
        run_all(cells, options.out, options.parallel)
        results.write_text(json.dumps(collect(cells, options.out), indent=1) + "\n")
    runs = json.loads(results.read_text())
    table = _table(runs)
    (HERE / "table.md").write_text(f"Commit {commits(runs)}.\n\n{table}")
    _draw(runs, HERE / "curves.png")
    print(table)


def _unpruned(method: str) -> tuple[str, ...]:
    return ("target_sparsity=0.0",) if method == "fedavg" else ()


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, group in by_name(runs).items():
        reached = column(group, "time_to_target_seconds")
        rows.append(
            (
                name,
                ", ".join(str(run["seed"]) for run in group),
                interval(column(group, "smoothed_accuracy")),
                interval(column(group, "device_accuracy_mean")),
                f"{min(column(group, 'device_accuracy_min')):.3f}",
                f"{100 * min(column(group, 'sparsity_prunable')):.0f} %",
                interval([seconds / 60 for seconds in column(group, "virtual_seconds")], 1),
                interval([seconds / 60 for seconds in reached], 1) if len(reached) == len(group) else "not by all",
                interval([count / 1e6 for count in column(group, "uploaded_bytes")], 0),
            )
        )
    header = (
        "method", "seeds", "global, smoothed", "devices, mean", "worst device", "prunable parameters cut",
        "virtual minutes", "virtual minutes to 0.80", "MB uploaded",
    )  # fmt: skip
    return markdown(header, rows)


def _draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for colour, (name, group) in zip(COLOURS, by_name(runs).items(), strict=False):
        for number, run in enumerate(group):
            minutes = [point[1] / 60 for point in run["curve"]]
            smoothed = [point[3] for point in run["curve"]]
            axis.plot(minutes, smoothed, "o-", ms=3, lw=1.3, color=colour, label=None if number else name)
    axis.set(
        title="SST-2, 80 devices, 10 per round: smoothed accuracy, one line per seed",
        xlabel="virtual time, minutes",
        ylabel="accuracy of the global model",
        ylim=(0.5, 0.88),
    )
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
