"""The headline: every method at equal sparsity on three tasks, and its cost on three populations of devices.

    .venv/bin/python experiments/headline/run.py [--tasks sst2] [--populations mixed] [--methods fedspine,fedit] \\
        [--seeds 3] [--first-seed 0] [--parallel 2] [--out runs/headline] [-s KEY=VALUE]

Each (task, population) is a `fedspine compare` of its own, in OUT/TASK-POPULATION; finished runs are not run again,
killed ones continue. Populations after `mixed` train only what looks at times, and take the other methods' runs from
it. Writes results.json, tables.md, accuracy.png and costs.png beside this file after each of them; with --table from
results.json alone. What results.json holds already stays in it, with the commit that gave it, unless a run of the same
method and seed takes its place or its method or keys are not those of today: so a table can grow over several machines
and days. Times and memory of inference are measured where hetlora, with which they are compared, is among the methods.

The accuracy whose time is compared is 95 % of what unpruned FedIT ends with on the task, rounded down to half a point;
it counts once the model is cut as far as it will be. A method that does not get there is told so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from math import floor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from grid import COMMIT, commit  # noqa: E402

from fedspine.comparison import FILE, Cell, Progress, compare, plan  # noqa: E402
from fedspine.config import RunConfig, parse_override  # noqa: E402
from fedspine.report.comparison_figures import draw_accuracy, draw_costs, new_figure, save_figure  # noqa: E402
from fedspine.report.comparison_tables import (  # noqa: E402
    Run,
    Table,
    View,
    by_method,
    interval,
    markdown_rows,
    paired_difference,
    paired_ratio,
    relative_table,
    seconds_to,
    target_of,
    traffic,
)
from fedspine.report.records import write_atomically  # noqa: E402

METHODS = (
    "fedspine", "fedspine with equal local work", "fedspine + distilling", "fedspine without levers", "fedspine-paper",
    "loraprune", "llm-pruner", "llm-pruner with levers", "apt", "magnitude", "random-pruning", "fedmp",
    "fedit", "fedit with levers", "ffa-lora", "rolora", "flexlora", "lora-fair", "hetlora", "fedprox", "flora",
    "fedex-lora", "fedsa-lora",
)  # fmt: skip
"""The first is what all are compared with."""
BASELINE = "hetlora"
"""Whose costs are 100 %."""
DENSE, SHARE = "fedit", 0.95
"""What sets the target, and the share of its accuracy."""
PERSONAL = ("fedsa-lora",)
"""Whose devices have models of their own: no time to an accuracy, as the curve is that of a model nobody uses."""
TASKS = ("sst2", "trec", "qnli")
POPULATIONS = {
    "mixed": "jetson-80",
    "compute-bound": "jetson-80-compute-bound",
    "communication-bound": "jetson-80-communication-bound",
}
FIGURES = (
    "device_accuracy_mean", "device_accuracy_min", "smoothed_accuracy", "sparsity_prunable", "virtual_seconds",
    "mean_waiting_seconds", "uploaded_bytes", "downloaded_bytes", "device_memory_bytes",
)  # fmt: skip
"""Of a summary, kept in results.json."""

Found = dict[tuple[str, str], tuple[list[Run], View]]
"""Runs, and how they are compared, by (task, population)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/headline"), help="where the comparisons go")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="A,B,...")
    parser.add_argument("--populations", default=",".join(POPULATIONS), metavar="A,B,...", help="mixed first")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="A,B,...")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0, metavar="K", help="the seeds are K, K + 1, ...")
    parser.add_argument("--parallel", type=int, default=2, metavar="K", help="runs at a time, one process each")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="for a short trial")
    parser.add_argument("--results", type=Path, default=HERE, metavar="DIR", help="folder of results.json and the rest")
    parser.add_argument("--table", action="store_true", help="only tables and figures, from results.json")
    options = parser.parse_args()
    if options.set and options.results == HERE:
        parser.error("-s: such runs are no part of the table here; give --results DIR for theirs")
    for name, known in (("tasks", TASKS), ("populations", tuple(POPULATIONS)), ("methods", METHODS)):
        if unknown := [each for each in getattr(options, name).split(",") if each not in known]:
            parser.error(f"--{name} {unknown[0]}: there are {', '.join(known)}")
    results = options.results / "results.json"
    if not options.table:
        results.parent.mkdir(parents=True, exist_ok=True)
        for task in options.tasks.split(","):
            for population in options.populations.split(","):
                new = _compare(task, population, options)
                before = json.loads(results.read_text())["comparisons"] if results.exists() else []
                after = _merged(before, new, task, population, options)
                write_atomically(results, (json.dumps({"comparisons": after}) + "\n").encode())
    saved = json.loads(results.read_text())
    found: Found = {}
    targets = {entry["task"]: _target(entry["runs"]) for entry in reversed(saved["comparisons"])}  # mixed goes first
    for entry in saved["comparisons"]:
        methods = {run["method"] for run in entry["runs"]}
        inference = entry["inference"] if BASELINE in methods else {}
        view = View(targets[entry["task"]], BASELINE if BASELINE in methods else entry["runs"][0]["method"], inference)
        found[entry["task"], entry["population"]] = entry["runs"], view
    text = _page(found)
    (options.results / "tables.md").write_text(text)
    _draw(found, options.results)
    print(text)


def _target(runs: Sequence[Run]) -> float | None:
    """None, the highest that every run reached, without the method that sets it."""
    ends = [run["summary"]["smoothed_accuracy"] for run in runs if run["method"] == DENSE]
    return floor(200 * SHARE * sum(ends) / len(ends)) / 200 if ends else None


def _compare(task: str, population: str, options: argparse.Namespace) -> dict[str, Any]:
    """What its comparison.json holds."""
    first = next(iter(POPULATIONS))
    methods = options.methods.split(",")
    out = options.out / f"{task}-{population}"
    compare(
        HERE / f"{task}.toml",
        methods=methods,
        seeds=options.seeds,
        first_seed=options.first_seed,
        parallel=options.parallel,
        out=out,
        baseline=BASELINE if BASELINE in methods else "",
        inference=population == first and BASELINE in methods and options.first_seed == 0,
        retime=options.out / f"{task}-{first}" if population != first else None,
        on_progress=lambda cell, progress: _say(out, cell, progress),
        **_overrides(population, options),
    )
    found: dict[str, Any] = json.loads((out / FILE).read_text())
    for run in found["runs"]:
        cell = Cell(run["method"], run["seed"], RunConfig())
        run["commit"] = (out / "runs" / cell.name / COMMIT).read_text().strip()
    return found


def _say(out: Path, cell: Cell, progress: Progress) -> None:
    if progress.state in ("finished", "failed"):
        print(f"{out.name}: {cell.name} {progress.state} {progress.accuracy or 0:.3f}", flush=True)
    made = out / "runs" / cell.name / COMMIT
    if progress.state == "finished" and not made.exists():
        made.write_text(commit() + "\n")


def _merged(
    before: Sequence[dict[str, Any]], new: dict[str, Any], task: str, population: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The comparisons of results.json with one of them renewed: runs of other keys leave, with what was measured."""
    empty = {"task": task, "population": population, "inference": {}, "runs": []}
    others = {(entry["task"], entry["population"]): entry for entry in before}
    entry = others.pop((task, population), empty)
    seeds = 1 + max(run["seed"] for run in [*entry["runs"], *new["runs"]])
    keys = _keys(task, population, seeds, options)
    known = [run for run in entry["runs"] if run["method"] in METHODS]
    old = {_place(run): run for run in known if run["keys"] == keys.get(_place(run))}
    runs = old | {_place(run): _light(run, keys[_place(run)]) for run in new["runs"]}
    same = {run["method"] for place, run in old.items() if place[1] == 0 and runs[place]["summary"] == run["summary"]}
    measured = {method: ratios for method, ratios in entry["inference"].items() if method in same}
    others[task, population] = {
        "task": task,
        "population": population,
        "inference": measured | new["inference"],
        "runs": [runs[place] for place in sorted(runs)],
    }
    return [others[place] for task in TASKS for each in POPULATIONS if (place := (task, each)) in others]


def _place(run: Mapping[str, Any]) -> tuple[int, int]:
    """Of a run in a table: its method's, its seed."""
    return METHODS.index(run["method"]), run["seed"]


def _keys(task: str, population: str, seeds: int, options: argparse.Namespace) -> dict[tuple[int, int], str]:
    """A digest of the keys of every run, by place."""
    cells = plan(HERE / f"{task}.toml", METHODS, seeds, _overrides(population, options))
    return {
        (METHODS.index(cell.method), cell.seed): sha256(cell.config.to_json().encode()).hexdigest()[:10]
        for cell in cells
    }


def _overrides(population: str, options: argparse.Namespace) -> dict[str, Any]:
    return {"population": POPULATIONS[population], **dict(parse_override(text) for text in options.set)}


def _light(run: Mapping[str, Any], keys: str) -> dict[str, Any]:
    """What tables and figures need of a run."""
    kept = "clock_seconds", "floor_ratio", "smoothed_accuracy"
    curve = [{key: point[key] for key in kept} for point in run["curve"]]
    summary = {key: run["summary"][key] for key in FIGURES}
    return {
        "method": run["method"],
        "seed": run["seed"],
        "commit": run["commit"],
        "keys": keys,
        "summary": summary,
        "curve": curve,
    }


def _page(found: Found) -> str:
    commits = dict.fromkeys(run["commit"] for runs, _ in found.values() for run in runs)
    mixed = {task: runs for (task, population), (runs, _) in found.items() if population == "mixed"}
    lines = [
        f"Commit {', '.join(commits)}. Mean ± 95 % interval over seeds (Student's t); differences and ratios are "
        "paired by seed."
    ]
    reference = METHODS[0]
    if mixed:
        title = f"Table A: accuracy of the devices' own models; points (hundredths): against {reference}"
        lines += ["", f"## {title}", "", *markdown_rows(_accuracies(mixed))]
    targets = ", ".join(f"{target_of(*each):.3f} ({task}, {population})" for (task, population), each in found.items())
    title = f"Table B: virtual time to a common accuracy; {reference} is so many times as fast"
    lines += ["", f"## {title}", "", f"Targets: {targets}.", "", *markdown_rows(_times(found))]
    for task, runs in mixed.items():
        view = found[task, "mixed"][1]
        table = relative_table(_timed(runs), target_of(runs, view), view)
        lines += ["", f"## Table B, {task}: {table.title}", "", *markdown_rows(table)]
    return "\n".join(lines) + "\n"


def _accuracies(by_task: Mapping[str, Sequence[Run]]) -> Table:
    columns = []
    for task, runs in by_task.items():
        groups = by_method(runs)
        reference = next(iter(groups.values()))

        def points(group: Sequence[Run], reference: Sequence[Run] = reference) -> str:
            return "" if group is reference else paired_difference(group, reference, "device_accuracy_mean")

        figures: tuple[tuple[str, Callable[[Sequence[Run]], str]], ...] = (
            ("cut", lambda group: f"{100 * min(_column(group, 'sparsity_prunable')):.0f} %"),
            ("mean", lambda group: interval(_column(group, "device_accuracy_mean"))),
            ("worst device", lambda group: f"{min(_column(group, 'device_accuracy_min')):.3f}"),
            ("points", points),
        )
        columns += [(f"{task}: {title}", groups, of) for title, of in figures]
    return _table(columns)


def _times(found: Found) -> Table:
    columns = []
    for (task, population), (runs, view) in found.items():
        groups, target = _timed(runs), target_of(runs, view)
        reference = next(iter(groups.values()))

        def slower(group: Sequence[Run], reference: Sequence[Run] = reference, target: float = target) -> str:
            return "1" if group is reference else paired_ratio(reference, group, lambda run: seconds_to(run, target))

        columns.append((f"{task}, {population}", groups, slower))
    return _table(columns)


def _timed(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by method, where the time to an accuracy means something."""
    return by_method([run for run in runs if run["method"] not in PERSONAL])


def _table(columns: Sequence[tuple[str, Mapping[str, Sequence[Run]], Callable[[Sequence[Run]], str]]]) -> Table:
    """A row per method, a cell per column where the method was run."""
    methods = dict.fromkeys(method for _, groups, _ in columns for method in groups)
    rows = [
        (method, *(of(groups[method]) if method in groups else "-" for _, groups, of in columns)) for method in methods
    ]
    return Table("", ("method", *(title for title, _, _ in columns)), tuple(rows))


def _column(group: Sequence[Run], key: str) -> list[float]:
    return [float(run["summary"][key]) for run in group]


def _draw(found: Found, directory: Path) -> None:
    shown: dict[str, tuple[str, dict[str, list[Run]]]] = {}  # a task's first population, usually mixed
    for (task, population), (runs, _) in found.items():
        shown.setdefault(task, (population, by_method(runs)))
    shown = {task: each for task, each in shown.items() if DENSE in each[1]} or shown  # others are not complete yet
    methods = [name for name in METHODS if all(name in groups for _, groups in shown.values())]  # one legend for all
    figure = new_figure(2.5 + 5 * len(shown), 4.5)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (task, (population, groups)) in zip(axes, shown.items(), strict=True):
        draw_accuracy(axis, {name: groups[name] for name in methods})
        axis.set_title(f"{task}, {population}: smoothed accuracy, mean over seeds")
        if axis is not axes[-1]:
            axis.get_legend().remove()
    save_figure(figure, directory / "accuracy.png")
    heights = [0.9 + 0.22 * len(_timed(runs)) for runs, _ in found.values()]
    figure = new_figure(10, sum(heights))
    for axes, ((task, population), (runs, view)) in zip(
        figure.subplots(len(heights), 3, squeeze=False, sharey="row", height_ratios=heights), found.items(), strict=True
    ):
        groups, target = _timed(runs), target_of(runs, view)
        panels = (
            (f"{task}, {population}: time to {target:.3f}", "virtual seconds", partial(seconds_to, target=target)),
            ("waiting", "virtual s per device and round", lambda run: run["summary"]["mean_waiting_seconds"]),
            ("traffic", "MB, both ways", lambda run: traffic(run) / 1e6),
        )
        for axis, (title, label, of) in zip(axes, panels, strict=True):
            draw_costs(axis, groups, [[of(run) or float("nan") for run in group] for group in groups.values()])
            axis.set(title=title, xlabel=label)
    save_figure(figure, directory / "costs.png")


if __name__ == "__main__":
    main()
