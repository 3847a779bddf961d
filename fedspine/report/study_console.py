"""A study in a terminal: the plan as a table, and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedspine.study.design import Study
from fedspine.study.estimate import MARGIN, CellPlan


def print_plan(study: Study, plans: Sequence[CellPlan], as_json: bool = False) -> None:
    """On stdout: one row per cell, seeds together."""
    if as_json:
        cells = [{"levels": dict(p.cell.levels), "seed": p.cell.seed, **asdict(p.estimate)} for p in plans]
        print(json.dumps(cells, indent=1))
        return
    shown = [plan for plan in plans if plan.cell.seed == 0]
    factors = [factor for factor in study.vary if any(plan.cell.levels[factor] is not None for plan in shown)]
    table = Table(title=f"{study.name} on {study.device}: one device's need", title_justify="left")
    for heading in (", ".join(factors), f"MB x {MARGIN:g}", "seconds", "MB sent", "infeasible because"):
        table.add_column(heading, overflow="fold", justify="right" if heading[0] in "Ms" else "left")
    for plan in shown:
        levels = [str(level) for factor in factors if (level := plan.cell.levels[factor]) is not None]
        need = plan.estimate
        traffic = (need.upload_bytes + need.download_bytes) / 1e6
        figures = (f"{MARGIN * need.memory_bytes / 1e6:.0f}", f"{need.seconds:.1f}", f"{traffic:.1f}")
        style = "dim" if need.infeasible else None
        table.add_row(", ".join(levels), *figures, need.infeasible, style=style)
    Console(highlight=False).print(table)
    feasible = [plan for plan in plans if not plan.estimate.infeasible]
    hours = sum(plan.estimate.seconds for plan in feasible) * study.users / 3600
    print(f"{len(feasible)} of {len(plans)} cells can run ({study.seeds} seeds): {hours:.2f} device hours")


class StudyProgress:
    """A bar on stderr, of cells or of what else is counted."""

    def __init__(self, what: str = "cells", quiet: bool = False) -> None:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True, quiet=quiet))
        self._task = self._progress.add_task(what, total=None)

    def update(self, done: int, of: int) -> None:
        self._progress.start()  # not before: a mistake in the file is told without a bar
        self._progress.update(self._task, completed=done, total=of)

    def __enter__(self) -> StudyProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:  # stopping prints a line
            self._progress.stop()
