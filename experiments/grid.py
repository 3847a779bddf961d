"""Run configurations x seeds, resumable run by run, and put the summaries side by side.

Used by the folders beside this file. Every run is `fedspine.simulate` into `<out>/<name>-seed<k>`; a finished run is
not run again, a killed one is resumed. Two runs at a time fill two cores (each run is one process, one thread).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}
"""Two-sided 95 % quantiles of Student's t by number of seeds."""


COMMIT = "commit.txt"
"""In a run's directory: the commit that finished it."""


@dataclass(frozen=True)
class Cell:
    """One run: a name for the table's row, a configuration file, overrides, a seed."""

    name: str
    config: Path
    overrides: tuple[str, ...]
    seed: int

    def directory(self, out: Path) -> Path:
        return out / f"{self.name}-seed{self.seed}"


def run_all(cells: Sequence[Cell], out: Path, parallel: int) -> None:
    """Run what is missing, `parallel` at a time; stop at the first failure."""
    todo = [cell for cell in cells if not (cell.directory(out) / "summary.json").exists()]
    print(f"{len(cells)} runs, {len(cells) - len(todo)} finished, {len(todo)} to do", flush=True)
    with ThreadPoolExecutor(parallel) as pool:
        for cell, seconds in pool.map(lambda cell: _run(cell, out), todo):
            print(f"finished {cell.name} seed {cell.seed}: {seconds:.0f} s of rounds", flush=True)


def _run(cell: Cell, out: Path) -> tuple[Cell, float]:
    directory = cell.directory(out)
    command = [sys.executable, "-m", "fedspine", "simulate", "--engine", "inline", "--json"]
    if (directory / "config.toml").exists():
        command += ["--resume", str(directory)]
    else:
        command += [str(cell.config), "--out", str(directory), "-s", f"seed={cell.seed}"]
        for override in cell.overrides:
            command += ["-s", override]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    (directory / COMMIT).write_text(commit() + "\n")
    return cell, float(json.loads(done.stdout)["wall_seconds"])


def collect(cells: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """One entry per finished run: row name, seed, commit, summary, and the curve as [round, virtual seconds, accuracy,
    smoothed accuracy] of every evaluated round."""
    found = []
    for cell in cells:
        directory = cell.directory(out)
        if not (directory / "summary.json").exists():
            continue
        rounds = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
        curve = [
            [line["round"], round(line["clock_seconds"], 3), line["accuracy"], line["smoothed_accuracy"]]
            for line in rounds
            if line["accuracy"] is not None
        ]
        summary = json.loads((directory / "summary.json").read_text())
        made = (directory / COMMIT).read_text().strip()
        found.append({"name": cell.name, "seed": cell.seed, "commit": made, "summary": summary, "curve": curve})
    return found


def commits(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which commits made the runs: `abc` or `abc (seed 0), def (seeds 1, 2)`."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run["commit"], set()).add(run["seed"])
    if len(seeds) == 1:
        return next(iter(seeds))
    return ", ".join(f"{made} (seed {', '.join(map(str, sorted(used)))})" for made, used in sorted(seeds.items()))


def by_name(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Runs by row name, in the order given."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["name"], []).append(run)
    return groups


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half width of the 95 % interval over seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = T_95.get(len(values), 2.0) * deviation / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def column(runs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A figure of the summaries; runs without it are left out."""
    return [float(run["summary"][key]) for run in runs if run["summary"][key] is not None]


def commit() -> str:
    """The commit that is checked out, marked when files differ from it, other than texts, figures and results."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    kept = [f":(top,exclude,glob){pattern}" for pattern in ("**/*.md", "**/*.png", "experiments/**/*.json")]
    changed = git("diff", "--name-only", "HEAD", "--", ":(top)", *kept)
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("-dirty" if changed else "")
