"""What `fedspine bench` shows: a progress bar on stderr, then on stdout one table, ratios first, and a sentence."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from fedspine.benchmark import BenchResult, Figures
from fedspine.report.console import progress_bar, size


class BenchConsole:
    """Shows a measurement while it runs and its result."""

    def __init__(self, quiet: bool = False) -> None:
        self._stderr = Console(stderr=True, quiet=quiet, highlight=False)
        self._stdout = Console(quiet=quiet, highlight=False)
        self._progress: Progress | None = None

    def progress(self, what: str, done: int, total: int) -> None:
        """A step of a measurement is done: see `fedspine.benchmark.Progress`."""
        if not self._stderr.is_terminal or self._stderr.quiet:
            return
        if self._progress is None:
            self._progress = progress_bar(self._stderr)
            self._progress.start()
        tasks = self._progress.tasks
        if not tasks or tasks[-1].description != what:
            self._progress.add_task(what, total=total, note="")
        self._progress.update(self._progress.tasks[-1].id, completed=done)

    def close(self) -> None:
        """Stop the progress bar; the terminal is as it was."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def finished(self, result: BenchResult) -> None:
        self.close()
        self._stdout.print(bench_table(result))
        if words := in_words(result):
            self._stdout.print(words)
        if result.note:
            self._stdout.print(f"[yellow]note:[/] {escape(result.note)}")


def bench_table(result: BenchResult) -> Table:
    """A row per figure: the ratio, the model's, the other's."""
    settings, against = result.settings, result.against
    table = Table(
        title=f"{settings.length} tokens, {settings.dtype} on {settings.device}, {settings.threads} thread(s), "
        f"{settings.repeats} repeats" + (" in alternation" if against else ""),
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    if against:
        table.add_column("ratio", justify="right", style="bold")
    for name in _short_names(result):
        table.add_column(escape(name), justify="right", overflow="fold")
    ours, theirs = _cells(result.model), _cells(against) if against else {}
    for name, (value, text) in ours.items():
        if not against:
            table.add_row(name, text)
            continue
        other, other_text = theirs[name]
        table.add_row(name, f"{value / other:.2f}" if value and other else "", text, other_text)
    return table


def in_words(result: BenchResult) -> str:
    """The comparison in one sentence; empty where there is none."""
    if result.against is None:
        return ""
    ratios = result.ratios()
    slowest = ratios["latency"][-1]
    parts = [f"{ratios['parameters']:.2f} of the parameters"]
    if ratios["weight_bytes"]:
        parts.append(f"{ratios['weight_bytes']:.2f} of the bytes on disk")
    if ratios["peak_memory"]:
        parts.append(f"{ratios['peak_memory']:.2f} of the peak memory")
    parts.append(f"{slowest['p50']:.2f} of the time for a batch of {slowest['batch']}")
    model, against = map(escape, _short_names(result))
    return f"{model} takes {', '.join(parts)}: {1 / slowest['p50']:.2f} times as fast as {against}."


def _short_names(result: BenchResult) -> list[str]:
    """The last parts of the names, or the whole names where these are equal."""
    names = [figures.name for figures in (result.model, result.against) if figures]
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else names


def _cells(figures: Figures) -> dict[str, tuple[float | None, str]]:
    """Name of a figure to its value and how it is written."""
    cells: dict[str, tuple[float | None, str]] = {}
    for row in figures.latency:
        for name, seconds in (("median", row.p50), ("95th percentile", row.p95), ("minimum", row.minimum)):
            cells[f"latency, batch {row.batch}, {name}"] = seconds, f"{1e3 * seconds:.2f} ms"
    for made in figures.generation:
        cells[f"tokens per second, batch {made.batch}"] = made.tokens_per_second, f"{made.tokens_per_second:.1f}"
    cells["peak memory"] = figures.peak_memory_bytes, size(figures.peak_memory_bytes)
    cells["... with the libraries"] = figures.process_peak_bytes, size(figures.process_peak_bytes)
    cells["parameters"] = figures.parameters, f"{figures.parameters / 1e6:.2f} M"
    disk = figures.weight_bytes
    cells["weights on disk"] = disk, "unknown" if disk is None else size(disk)
    return cells
