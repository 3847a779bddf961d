"""The levers without training: virtual seconds and waiting of 24 rounds, on three populations, seeds 0 to 2.

.venv/bin/python experiments/levers/schedule.py      # half a minute; writes schedule.md beside this file
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from fedspine import schedule

POPULATIONS = ("jetson-80", "jetson-80-compute-bound", "jetson-80-communication-bound")
PLAIN = {"sampling": "uniform", "roll_call": False, "wire_dtype": "float32", "local_work": "equal", "ramp_ratio": 0.6}
COHORTS = {"sampling": "speed", "roll_call": True}
ROWS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg"},
    "policy=fixed": {"policy": "fixed"},
    "fedspine": {},
    "... sampling=speed": {"sampling": "speed"},
    "... roll_call=true": COHORTS,
    "... min_rank=8": {**COHORTS, "min_rank": 8},
    "... local_work=deadline": {**COHORTS, "min_rank": 8, "local_work": "deadline"},
    "fedspine close_at=0.7": {"close_at": 0.7},
}
"""A row that begins with dots adds to the one above it."""
SEEDS = (0, 1, 2)


def main() -> None:
    header = ("", *(f"{population}: s, waiting" for population in POPULATIONS))
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, keys in ROWS.items():
        cells = [_cell(population, keys) for population in POPULATIONS]
        lines.append("| " + " | ".join((name, *cells)) + " |")
    text = "\n".join(lines) + "\n"
    Path(__file__).with_name("schedule.md").write_text(text)
    print(text)


def _cell(population: str, keys: dict[str, Any]) -> str:
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as directory:
            run = schedule(
                out=Path(directory) / "run", population=population, rounds=24, seed=seed, **{**PLAIN, **keys}
            )
        found.append(run.summary)
    seconds, waiting = (fmean(each[key] for each in found) for key in ("virtual_seconds", "mean_waiting_seconds"))
    return f"{seconds:.0f}, {waiting:.2f}"


if __name__ == "__main__":
    main()
