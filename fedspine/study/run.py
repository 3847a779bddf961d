"""`fedspine study`: plan, run and report. One JSON file per finished cell, so that a study goes on where it stopped.

Directory: `study.json` (what all cells share), `cells/NAME.json`, and the report: `report.md`, `report.json`,
`report.html`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fedspine.errors import CheckpointError, ConfigError, FedSpineError
from fedspine.processes import Job, run_jobs
from fedspine.report.records import write_atomically
from fedspine.study.design import Study, load_study
from fedspine.study.estimate import CellPlan, plan_cell
from fedspine.study.metrics import check_metric
from fedspine.study.quantise import check_quantiser
from fedspine.study.retrieve import check_retriever
from fedspine.study.tasks import PersonalTask, personal_task

FILE = "study.json"
Result = dict[str, Any]
"""What `fedspine.study.learn.run_cell` returns."""


def default_directory(study: Study) -> Path:
    return Path("runs") / f"study-{study.name}"


def plan_study(study: Study) -> list[CellPlan]:
    """Every cell with its configuration, cost and, where it cannot run, the reason.

    Errors: subclasses of `FedSpineError` for what no cell could use: data, users, device, metric, an absent extra.
    """
    tasks = _Tasks(study)
    plans = []
    for cell in study.cells():
        task = tasks[str(cell.levels["task"]), cell.seed]
        check_metric(study.metric, task)
        task.check_held_out(study.test_examples)
        if cell.levels["retriever"]:
            check_retriever(str(cell.levels["retriever"]))
        check_quantiser(cell.levels["compression"] or "none")
        plans.append(plan_cell(study, cell, task))
    return plans


def run_study(
    path: str | Path,
    out: str | Path | None = None,
    parallel: int = 1,
    shard: tuple[int, int] = (1, 1),
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Run the cells that are not finished. Returns the directory.

    `parallel`: processes. `shard` (k, n): every n-th cell only, from the k-th, for several machines that share `out`.
    `on_progress`: called with the finished cells and how many there are.
    Errors: subclasses of `FedSpineError`; before anything is written, but for a cell that fails.
    """
    study = load_study(path)
    if parallel < 1:
        raise ConfigError(f"parallel = {parallel}: must be at least 1")
    if not 1 <= shard[0] <= shard[1]:
        raise ConfigError(f"shard = {shard[0]}/{shard[1]}: must be K/N with K from 1 to N")
    every = plan_study(study)
    feasible = [plan for plan in every if not plan.estimate.infeasible]
    if not feasible:
        raise ConfigError(f"none of the {len(every)} cells can run; the first: {every[0].estimate.infeasible}")
    plans = feasible[shard[0] - 1 :: shard[1]]
    directory = Path(out) if out is not None else default_directory(study)
    _claim(directory, study)
    if parallel > 1:
        command = [sys.executable, "-m", "fedspine", "study", "run", str(path), "--out", str(directory), "--json"]

        def poll(*_: object) -> None:
            on_progress(sum(_file(directory, plan).exists() for plan in plans), len(plans))

        if shard != (1, 1):
            raise ConfigError("parallel and shard: use one of them")
        run_jobs(
            [
                Job("study", partial(_with_shard, command, part, parallel), poll, poll)
                for part in range(1, parallel + 1)
            ],
            parallel,
        )
        return directory
    tasks = _Tasks(study)
    on_progress(0, len(plans))
    for done, plan in enumerate(plans, start=1):
        if not _file(directory, plan).exists():
            _run(study, plan, tasks[str(plan.cell.levels["task"]), plan.cell.seed], directory)
        on_progress(done, len(plans))
    return directory


def results(directory: Path) -> Iterator[Result]:
    """Of all finished cells, in the order of their names. Errors: `CheckpointError` when there is no study."""
    if not (directory / FILE).is_file():
        raise CheckpointError(f"{directory}: holds no study; start one with `fedspine study run`")
    for path in sorted((directory / "cells").glob("*.json")):
        yield {"name": path.stem, **json.loads(path.read_text(encoding="utf-8"))}


def check_same(directory: Path, study: Study) -> None:
    """Errors: `CheckpointError` when the directory holds something else, or a study whose cells are not comparable."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / FILE).is_file():
        raise CheckpointError(f"--out {directory}: holds something else than a study; choose another directory")
    found, now = json.loads((directory / FILE).read_text(encoding="utf-8")), _shared(study)
    for key, value in now.items():
        if found.get(key) != value:
            raise CheckpointError(
                f"--out {directory}: the study there has {key} = {found.get(key)!r}, now it would be {value!r}; "
                "choose another directory"
            )


class _Tasks:
    """Tasks by name and seed, made once; the last few are kept."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._made: dict[tuple[str, int], PersonalTask] = {}

    def __getitem__(self, key: tuple[str, int]) -> PersonalTask:
        if key not in self._made:
            name, seed = key
            self._made[key] = personal_task(name, self._study.tasks, self._study.users, seed)
        return self._made[key]


def _run(study: Study, plan: CellPlan, task: PersonalTask, directory: Path) -> None:
    from fedspine.study.learn import run_cell

    try:
        result = run_cell(study, plan, task, directory / "work" / plan.cell.name)
    except FedSpineError as error:
        levels = ", ".join(f"{factor} = {level}" for factor, level in plan.cell.levels.items() if level is not None)
        raise type(error)(f"cell {plan.cell.name} ({levels}): {error}") from None
    write_atomically(_file(directory, plan), (json.dumps(result, indent=1) + "\n").encode())


def _claim(directory: Path, study: Study) -> None:
    check_same(directory, study)
    (directory / "cells").mkdir(parents=True, exist_ok=True)
    write_atomically(directory / FILE, (json.dumps(_shared(study), indent=1) + "\n").encode())


def _shared(study: Study) -> dict[str, Any]:
    """What must be equal for cells of equal levels to be equal; levels, seeds and the design may grow."""
    grows = ("name", "seeds", "design", "interactions", "target", "fixed", "vary")
    return json.loads(json.dumps({key: value for key, value in asdict(study).items() if key not in grows}))  # type: ignore[no-any-return]


def _file(directory: Path, plan: CellPlan) -> Path:
    return directory / "cells" / f"{plan.cell.name}.json"


def _with_shard(command: Sequence[str], part: int, parts: int) -> list[str]:
    return [*command, "--shard", f"{part}/{parts}"]
