"""`fedspine schedule` in a terminal: a progress bar and a table, on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedspine.report.console import clock, progress_bar, size
from fedspine.schedule_only import ScheduledRound


class ScheduleConsole:
    """Shows `rounds` rounds; where there is no terminal, only the table."""

    def __init__(self, rounds: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._progress = progress_bar(self._console) if self._console.is_terminal else None
        if self._progress:
            self._progress.start()
            self._rounds = self._progress.add_task("rounds ", total=rounds, note="")

    def round_done(self, line: ScheduledRound) -> None:
        if self._progress:
            note = f"virtual {clock(line.clock_seconds)}  sparsity {line.mean_sparsity:.0%}  rank {line.mean_rank:.1f}"
            self._progress.update(self._rounds, completed=line.round, note=note)

    def close(self) -> None:
        """Stop the progress bar; the terminal is as it was."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def finished(self, summary: Mapping[str, Any], directory: Path) -> None:
        self.close()
        table = Table(title="schedule", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        rows = {
            "policy": f"{summary['policy']}, {summary['devices']:,} devices, {summary['sampled']} per round, "
            f"{summary['rounds']} rounds",
            "virtual time": clock(summary["virtual_seconds"]),
            "progress": f"{summary['progress']:.1f} (sum of qualities), "
            f"{summary['progress_per_virtual_second']:.3f} per virtual second",
            "waiting (virtual)": f"{clock(summary['mean_waiting_seconds'])} per device and round",
            "took part": f"{summary['devices_that_took_part']:,} devices, {summary['out_of_memory']} out of memory",
            "wall time": f"{clock(summary['wall_seconds'])}, "
            f"planning {summary['planning_ms_per_round']:.1f} ms per round",
            "memory here": f"peak {size(summary['peak_rss_bytes'])}, "
            f"{summary['bytes_per_idle_device']:.0f} bytes per idle device",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        self._console.print(table)
        self._console.print(f"[bold]{escape(str(directory))}[/]: schedule.jsonl, summary.json, config.toml")
