"""Learning or luck? Every policy against the clairvoyant choice, without training: regret over rounds, five seeds.

    .venv/bin/python experiments/regret/run.py [--out runs/regret] [--cells mixed ...]

Every run is `fedspine.schedule` into OUT/CELL-POLICY-seedK; finished runs are not run again. Writes results.json,
table.md, regret.png and rate.png beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from grid import commit, interval, markdown  # noqa: E402

from fedspine.report.comparison_figures import STYLES, new_figure, save_figure  # noqa: E402
from fedspine.report.comparison_tables import half_width  # noqa: E402
from fedspine.report.curves import COLOURS  # noqa: E402
from fedspine.schedule_only import schedule  # noqa: E402
from fedspine.surface import Surface  # noqa: E402

SEEDS = (0, 1, 2, 3, 4)
SMALL = {"devices": 80, "sampled": 10, "rounds": 40}
LARGE = {"devices": 1_000, "sampled": 100, "rounds": 40}
OTHER = Surface((0.3062, -0.2109, 0.3535, 0.4007, -0.4062, 0.2515), sigma=0.1182, r_squared=0.688)
"""Fitted to twelve runs (1,920 local rounds) of experiments/scheduling: policies random and s-ucb, the embedded task.
Elsewhere `fedspine.surface.DEFAULT` answers, fitted to three runs of method fedspine on SST-2."""
CELLS: dict[str, dict[str, Any]] = {
    "mixed": {**SMALL, "population": "jetson-80"},
    "communication-bound": {**SMALL, "population": "jetson-80-communication-bound"},
    "compute-bound": {**SMALL, "population": "jetson-80-compute-bound"},
    "compute-bound, steady": {**SMALL, "population": str(HERE / "steady.toml")},
    "compute-bound, drifting": {**SMALL, "population": str(HERE / "drift.toml")},
    "mixed, 200 rounds": {**SMALL, "population": "jetson-80", "rounds": 200},
    "compute-bound, drifting, 200 rounds": {**SMALL, "population": str(HERE / "drift.toml"), "rounds": 200},
    "mixed, 100 of 1,000": {**LARGE, "population": "jetson-80"},
    "compute-bound, drifting, 100 of 1,000": {**LARGE, "population": str(HERE / "drift.toml")},
    "mixed, the default ramp": {**SMALL, "population": "jetson-80", "ramp_ratio": 0.25},
    "communication-bound, the default ramp": {
        **SMALL,
        "population": "jetson-80-communication-bound",
        "ramp_ratio": 0.25,
    },
    "compute-bound, the default ramp": {**SMALL, "population": "jetson-80-compute-bound", "ramp_ratio": 0.25},
    "mixed, other surface": {**SMALL, "population": "jetson-80", "surface": OTHER},
    "compute-bound, other surface": {**SMALL, "population": "jetson-80-compute-bound", "surface": OTHER},
}
DRAWN = (
    "mixed", "compute-bound", "compute-bound, drifting", "mixed, 200 rounds", "compute-bound, drifting, 200 rounds",
    "mixed, 100 of 1,000",
)  # fmt: skip
BOUND, CONTROL, USUAL = "clairvoyant", "random", "fixed"
POLICIES: dict[str, dict[str, Any]] = {
    USUAL: {},
    CONTROL: {},
    "e-ucb": {"reward": "fedmp"},
    "tertile": {},
    "s-ucb": {"reward": "paper"},
    "time-model": {},
    "fedspine": {},
    "fedspine, always a small probe": {"policy": "fedspine", "probe": "always", "timed_examples": 2},
    BOUND: {},
}
"""Rows of the table; the name is the policy unless the keys say otherwise."""
ALONE = {
    "sampling": "uniform", "roll_call": False, "wire_dtype": "float32", "probe": "first", "timed_examples": 0,
    "local_work": "equal", "ramp_ratio": 0.6,
}  # fmt: skip
"""The policies by themselves, without what method fedspine has beside its policy; a whole iteration is probed, in a
device's first round, unless a row says otherwise."""

Floats = NDArray[np.float64]
Curves = dict[str, dict[int, dict[str, Floats]]]
"""Clock, worth and waiting after every round, by policy and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/regret"), help="where the runs go")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="only these")
    parser.add_argument("--results", type=Path, default=HERE, metavar="DIR", help="folder of results.json and the rest")
    parser.add_argument("--table", action="store_true", help="only the table and the figures, from results.json")
    options = parser.parse_args()
    path = options.results / "results.json"
    if not options.table:
        found = {cell: analysed(_curves(cell, options.out)) for cell in options.cells}
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"commit": commit(), "cells": found}) + "\n")
    saved = json.loads(path.read_text())
    text = f"Commit {saved['commit']}, seeds {', '.join(map(str, SEEDS))}.\n\n{_table(saved['cells'])}"
    (options.results / "table.md").write_text(text)
    _draw(saved["cells"], "regret", "extra virtual seconds so far", options.results / "regret.png")
    _draw(saved["cells"], "rate", "progress per virtual second so far", options.results / "rate.png")
    print(text)


def _curves(cell: str, out: Path) -> Curves:
    """Runs what is missing."""
    curves: Curves = {}
    for policy, keys in POLICIES.items():
        for seed in SEEDS:
            directory = out / f"{cell}-{policy}-seed{seed}".replace(",", "").replace(" ", "-")
            if not (directory / "summary.json").exists():
                shutil.rmtree(directory, ignore_errors=True)  # killed: a schedule does not resume
                schedule(out=directory, **{"policy": policy, "seed": seed, **ALONE, **CELLS[cell], **keys})
            lines = [json.loads(line) for line in (directory / "schedule.jsonl").read_text().splitlines()]
            curves.setdefault(policy, {})[seed] = {
                key: np.array([line[key] for line in lines]) for key in ("clock_seconds", "worth", "waiting_seconds")
            }
        print(f"{cell}: {policy}", flush=True)
    return curves


def regret(own: Mapping[str, Floats], best: Mapping[str, Floats]) -> Floats:
    """Virtual seconds that a policy took after every round, less what the clairvoyant took to the same progress.

    Between rounds the clairvoyant goes on a straight line; beyond its last round at the rate of its last quarter.
    """
    clock, worth = (np.concatenate([[0.0], best[key]]) for key in ("clock_seconds", "worth"))
    quarter = len(clock) // 4 + 1
    slope = (clock[-1] - clock[-quarter]) / (worth[-1] - worth[-quarter])
    needed = np.interp(own["worth"], worth, clock) + slope * np.maximum(own["worth"] - worth[-1], 0.0)
    difference: Floats = own["clock_seconds"] - needed
    return difference


def first_separable(own: Sequence[Floats], other: Sequence[Floats]) -> int | None:
    """First round from which on, to the end, `own` is below `other` with 95 % confidence; [seed] of [round], paired."""
    differences = np.array(other) - np.array(own)
    clear = [mean > (half_width(row) or np.inf) for row, mean in zip(differences.T, differences.mean(0), strict=True)]
    late = next((number for number, each in enumerate(reversed(clear)) if not each), len(clear))
    return len(clear) - late + 1 if late else None


def analysed(curves: Curves) -> dict[str, Any]:
    """Per policy: regret and rate over rounds (mean, half width), and the figures of the table, one per seed."""
    regrets = {policy: [regret(runs[seed], curves[BOUND][seed]) for seed in SEEDS] for policy, runs in curves.items()}
    price = {policy: [_seconds_per_worth(runs[seed]) for seed in SEEDS] for policy, runs in curves.items()}
    found = {}
    for policy, runs in curves.items():
        rates = [run["worth"] / run["clock_seconds"] for run in runs.values()]
        found[policy] = {
            "regret": _band(regrets[policy]),
            "rate": _band(rates),
            "seconds_per_progress": price[policy],
            "final_regret": [float(each[-1]) for each in regrets[policy]],
            "waiting": [float(run["waiting_seconds"].mean()) for run in runs.values()],
            "seconds": [float(run["clock_seconds"][-1]) for run in runs.values()],
            "closed": [
                (usual - own) / (usual - best)
                for usual, own, best in zip(price[USUAL], price[policy], price[BOUND], strict=True)
            ],
            "beats": {other: first_separable(regrets[policy], regrets[other]) for other in (CONTROL, USUAL)},
        }
    return found


def _seconds_per_worth(run: Mapping[str, Floats]) -> float:
    return float(run["clock_seconds"][-1] / run["worth"][-1])


def _band(curves: Sequence[Floats]) -> dict[str, list[float]]:
    """Mean and half width of the 95 % interval over seeds at about 40 rounds, the last among them; three digits."""
    table = np.array(curves)
    rounds = np.arange(table.shape[1], 0, -max(1, table.shape[1] // 40))[::-1]
    table = table[:, rounds - 1]
    return {
        "round": rounds.tolist(),
        "mean": [float(f"{value:.3g}") for value in table.mean(0)],
        "half": [float(f"{half_width(row) or 0.0:.2g}") for row in table.T],
    }


def _table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for cell, policies in cells.items():
        usual = policies[USUAL]
        for policy, found in policies.items():
            shares = [100 * own / other for own, other in zip(found["waiting"], usual["waiting"], strict=True)]
            rows.append(
                (
                    cell,
                    policy,
                    interval(found["seconds_per_progress"], 3),
                    interval(found["final_regret"], 1),
                    f"{interval([100 * share for share in found['closed']], 0)} %",
                    f"{interval(shares, 0)} %",
                    *(
                        "" if policy == other else _when(found["beats"][other], CELLS[cell]["sampled"])
                        for other in (CONTROL, USUAL)
                    ),
                )
            )
    header = (
        "population", "policy", "virtual s per unit of progress", "regret at the end, virtual s",
        "gap fixed to clairvoyant closed", "waiting against fixed", "better than random from round",
        "better than fixed from round",
    )  # fmt: skip
    return markdown(header, rows)


def _when(first: int | None, sampled: int) -> str:
    return f"{first} ({first * sampled:,} pulls)" if first else "not separable"


def _draw(cells: Mapping[str, Mapping[str, Any]], key: str, label: str, path: Path) -> None:
    drawn = {cell: policies for cell, policies in cells.items() if cell in DRAWN} or cells
    columns = 3
    rows = -(-len(drawn) // columns)
    figure = new_figure(2 + 4 * columns, 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (cell, policies) in zip(axes, drawn.items(), strict=False):
        for number, (policy, found) in enumerate(policies.items()):
            rounds, mean, half = (np.array(found[key][part]) for part in ("round", "mean", "half"))
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS)]
            colour = "black" if policy == BOUND else colour
            axis.plot(rounds, mean, style, lw=1.5, color=colour, label=policy)
            axis.fill_between(rounds, mean - half, mean + half, color=colour, alpha=0.12, lw=0)
        axis.set(title=cell, xlabel="round", ylabel=label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
