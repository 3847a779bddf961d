"""A language model that is cut: perplexity before and after federated tuning, beside the uncut model. Three seeds.

    .venv/bin/python experiments/stories/run.py [--out runs/stories] [--parallel 2]

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

SEEDS = (0, 1, 2)
ROWS = {
    "fedavg": ("method=fedavg", "target_sparsity=0.0"),
    "fedspine, 30 %": (),
    "fedspine, 50 %": ("target_sparsity=0.5",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stories"), help="where the runs go")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one process each")
    options = parser.parse_args()
    cells = [Cell(name, HERE / "stories.toml", keys, seed) for seed in SEEDS for name, keys in ROWS.items()]
    run_all(cells, options.out, options.parallel)
    runs = collect(cells, options.out)
    (HERE / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
    table = _table(runs)
    (HERE / "table.md").write_text(f"Commit {commits(runs)}.\n\n{table}")
    print(table)


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            name,
            f"{100 * min(column(group, 'sparsity_prunable')):.0f} %",
            interval(column(group, "perplexity_cut_untuned"), 2),
            interval(column(group, "smoothed_perplexity"), 2),
            interval(column(group, "device_perplexity_mean"), 2),
            interval(column(group, "smoothed_accuracy")),
            interval(column(group, "virtual_seconds"), 1),
        )
        for name, group in by_name(runs).items()
    ]
    header = (
        "method", "prunable parameters cut", "perplexity, cut and not tuned", "tuned: global model",
        "tuned: devices' own models", "token accuracy, global", "virtual seconds",
    )  # fmt: skip
    return markdown(header, rows)


if __name__ == "__main__":
    main()
