"""Equal layers against a global layer budget at the same sparsity, on SST-2.

    .venv/bin/python experiments/layer_budget/run.py [--out runs/layer_budget] [--parallel 2]

Writes results.json and table.md beside this file. Finished runs are not run again, killed ones continue.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from grid import Cell, by_name, collect, column, commits, interval, markdown, run_all  # noqa: E402

BUDGETS = ("uniform", "global")
SEEDS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/layer_budget"), help="where the runs go")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one process each")
    parser.add_argument("--table", action="store_true", help="only the table, from results.json")
    options = parser.parse_args()
    results = HERE / "results.json"
    if not options.table:
        cells = [
            Cell(budget, HERE / "sst2.toml", (f"layer_budget={budget}",), seed) for seed in SEEDS for budget in BUDGETS
        ]
        run_all(cells, options.out, options.parallel)
        results.write_text(json.dumps(collect(cells, options.out), indent=1) + "\n")
    runs = json.loads(results.read_text())
    table = _table(runs)
    (HERE / "table.md").write_text(f"Commit {commits(runs)}.\n\n{table}")
    print(table)


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, group in by_name(runs).items():
        by_seed = [f"{accuracy:.3f}" for accuracy in column(group, "device_accuracy_mean")]
        rows.append(
            (
                name,
                ", ".join(by_seed),
                interval(column(group, "smoothed_accuracy")),
                f"{min(column(group, 'device_accuracy_min')):.3f}",
                f"{100 * min(column(group, 'sparsity_prunable')):.1f} %",
                interval(column(group, "virtual_seconds"), 0),
            )
        )
    header = (
        "layer_budget", "devices' mean accuracy, by seed", "global, smoothed", "worst device",
        "prunable parameters cut", "virtual seconds",
    )  # fmt: skip
    return markdown(header, rows)


if __name__ == "__main__":
    main()
