"""Does the scheduler save virtual time at equal final sparsity? Five policies, two populations, three seeds.

    .venv/bin/python experiments/scheduling/run.py [--out runs/scheduling] [--parallel 2]

All runs end with every device at 50 % of its prunable parameters; what is compared is the virtual time at which the
smoothed accuracy reaches a common target. Writes results.json, table.md and times.png beside this file. Finished runs
are not run again, killed ones continue.
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

from grid import Cell, by_name, collect, commits, interval, markdown, run_all  # noqa: E402

from fedspine.report.curves import COLOURS  # noqa: E402

POPULATIONS = {"compute-bound": "jetson-80-compute-bound", "communication-bound": "jetson-80-communication-bound"}
POLICIES = {
    "fixed": ("policy=fixed",),
    "random": ("policy=random",),
    "s-ucb": ("policy=s-ucb", "reward=paper"),
    "fedspine": ("policy=fedspine",),
    "clairvoyant": ("policy=clairvoyant",),
}
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scheduling"), help="where the runs go")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one process each")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="only these")
    parser.add_argument("--table", action="store_true", help="only the table and the figure, from results.json")
    options = parser.parse_args()
    results = HERE / "results.json"
    if not options.table:
        cells = [
            Cell(f"{kind}-{policy}", HERE / "embedded.toml", (f"population={population}", *POLICIES[policy]), seed)
            for seed in SEEDS
            for kind, population in POPULATIONS.items()
            for policy in options.policies
        ]
        run_all(cells, options.out, options.parallel)
        results.write_text(json.dumps(collect(cells, options.out), indent=1) + "\n")
    runs = json.loads(results.read_text())
    times = _times(runs)
    target = runs[0]["summary"]["target_accuracy"]
    text = f"Virtual seconds to a smoothed accuracy of {target}; commit {commits(runs)}, seeds "
    text += f"{', '.join(map(str, SEEDS))}.\n\n{_table(times, runs)}"
    (HERE / "table.md").write_text(text)
    _draw(times, HERE / "times.png")
    print(text)


def _times(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Virtual seconds to the target by population and policy, one per seed; a run that missed it counts in full."""
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in POPULATIONS}
    for name, group in by_name(runs).items():
        kind = next(kind for kind in POPULATIONS if name.startswith(f"{kind}-"))
        found[kind][name.removeprefix(f"{kind}-")] = [
            float(run["summary"]["time_to_target_seconds"] or run["summary"]["virtual_seconds"]) for run in group
        ]
    return found


def _table(times: Mapping[str, Mapping[str, Sequence[float]]], runs: Sequence[Mapping[str, Any]]) -> str:
    groups = by_name(runs)
    rows = []
    for kind, policies in times.items():
        for policy, seconds in policies.items():
            group = groups[f"{kind}-{policy}"]
            missed = sum(run["summary"]["time_to_target_seconds"] is None for run in group)
            closed = [
                100 * (fixed - own) / (fixed - best)
                for fixed, own, best in zip(policies["fixed"], seconds, policies["clairvoyant"], strict=True)
            ]
            rows.append(
                (
                    kind,
                    policy,
                    interval(seconds, 1) + (f" ({missed} missed)" if missed else ""),
                    f"{_mean(seconds) / _mean(policies['fixed']):.2f}",
                    f"{100 * _gap(policies, seconds):.0f} % ({', '.join(f'{share:.0f}' for share in closed)})",
                    interval([run["summary"]["virtual_seconds"] for run in group], 1),
                    interval([run["summary"]["mean_waiting_seconds"] for run in group], 2),
                    interval([run["summary"]["device_accuracy_mean"] for run in group]),
                )
            )
    header = (
        "population", "policy", "virtual s to target", "against fixed", "gap fixed to clairvoyant closed (by seed)",
        "virtual s in all", "waiting, s", "devices, mean accuracy",
    )  # fmt: skip
    return markdown(header, rows)


def _gap(policies: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> float:
    fixed, best = _mean(policies["fixed"]), _mean(policies["clairvoyant"])
    return (fixed - _mean(seconds)) / (fixed - best)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _draw(times: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (kind, policies) in zip(figure.subplots(1, len(times)), times.items(), strict=True):
        for place, (policy, seconds) in enumerate(policies.items()):
            colour = COLOURS[0] if policy == "fedspine" else "#9a9a9a"
            axis.barh(place, _mean(seconds), color=colour, alpha=0.75)
            axis.plot(seconds, [place] * len(seconds), "k|", ms=9)
        axis.set_yticks(range(len(policies)), list(policies))
        axis.invert_yaxis()
        axis.set(title=kind, xlabel="virtual seconds to the target (marks: seeds)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
