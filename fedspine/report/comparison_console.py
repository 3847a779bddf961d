"""A comparison in a terminal: one row per method, one column per seed, alive."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedspine.comparison import Cell, Comparison, Progress
from fedspine.report.comparison_tables import tables


class ComparisonConsole:
    """Everything goes to stderr; where there is no terminal, a line per finished run."""

    def __init__(self, cells: Sequence[Cell], quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._cells = {(cell.method, cell.seed): cell for cell in cells}
        self._progress = {place: Progress("waiting") for place in self._cells}
        self._lock = threading.Lock()
        self._live: Live | None = None
        if self._console.is_terminal and not quiet:
            self._live = Live(self._table(), console=self._console, refresh_per_second=2)
            self._live.start()

    def update(self, cell: Cell, progress: Progress) -> None:
        with self._lock:
            before = self._progress[cell.method, cell.seed]
            self._progress[cell.method, cell.seed] = progress
            if self._live:
                self._live.update(self._table())
            elif progress.state != before.state and progress.state in ("finished", "failed"):
                done = sum(each.state == "finished" for each in self._progress.values())
                self._console.print(
                    f"{done}/{len(self._cells)} {cell.method}, seed {cell.seed}: {_text(cell, progress)}"
                )

    def finished(self, comparison: Comparison) -> None:
        self.close()
        for found in tables(comparison.runs, comparison.view):
            table = Table(title=found.title, title_justify="left", title_style="bold")
            for heading in found.header:
                table.add_column(heading, justify="left" if heading == "method" else "right")
            for row in found.rows:
                table.add_row(*row)
            self._console.print(table)
        self._console.print(f"{comparison.directory}: tables.md, comparison.json, curves.png, costs.png, runs/")

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        seeds = sorted({seed for _, seed in self._cells})
        table = Table(title="runs: round, then the accuracy", title_justify="left")
        table.add_column("method")
        for seed in seeds:
            table.add_column(f"seed {seed}")
        for method in dict.fromkeys(method for method, _ in self._cells):
            places = [(method, seed) for seed in seeds]
            table.add_row(method, *(_text(self._cells[place], self._progress[place]) for place in places))
        return table


def _text(cell: Cell, progress: Progress) -> str:
    accuracy = "" if progress.accuracy is None else f" {progress.accuracy:.3f}"
    if progress.state == "running":
        return f"{progress.round}/{cell.config.rounds}{accuracy}"
    return f"{progress.state}{accuracy}"
