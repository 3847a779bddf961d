"""The run as a person sees it in a terminal: a plan, a progress bar, warnings, a table. Everything goes to stderr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedspine.report.observer import RunPlan
from fedspine.report.profile import profile, shares
from fedspine.report.summary import accuracy_name, iterations_text
from fedspine.types import OUT_OF_MEMORY, TRAINED, RoundRecord


class ConsoleObserver:
    """An `Observer` for terminals; where there is none, one plain line per evaluated round."""

    def __init__(self, quiet: bool = False, profiled: bool = False) -> None:
        self._profiled = profiled
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._progress: Progress | None = None
        self._plan: RunPlan | None = None
        self._warned: set[str] = set()
        self._records: list[RoundRecord] = []
        self.directory: Path | None = None

    def plan(self, plan: RunPlan) -> None:
        self._plan, self.directory = plan, plan.directory
        config = plan.config
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(Counter(plan.device_types).items()))
        lines = [
            f"[bold]{config.method}[/]: policy {config.policy}, importance {config.importance}, masks {config.masks}, "
            f"aggregation {config.aggregation}",
            f"model    {escape(config.model)}: {plan.total_parameters / 1e6:.1f} M parameters, "
            f"{plan.prunable_parameters / 1e6:.1f} M prunable (heads and FFN channels); "
            f"target sparsity {config.target_sparsity:.0%} of the prunable",
            f"data     {escape(config.data)}, partition {escape(config.partition)}",
            f"devices  {config.devices} ({kinds}), {config.sampled} per round, {config.rounds} rounds of "
            f"{iterations_text(config)} iterations x {config.batch_size} examples",
            f"traffic  {size(plan.smallest_message_bytes)} to {size(plan.largest_message_bytes)} per message, each way",
            f"memory   up to {size(plan.device_memory_bytes)} on a device (estimate)",
            f"here     engine {plan.engine}, {plan.workers} worker(s), {config.threads} thread(s) each"
            + (f", about {clock(plan.expected_wall_seconds)} of wall time" if plan.expected_wall_seconds else ""),
            f"results  {escape(str(plan.directory))}",
        ]
        self._console.print(Panel("\n".join(lines), title="plan", title_align="left"))
        self._console.print("loading model and data, starting the engine ...", style="dim")
        if self._console.is_terminal:
            self._progress = progress_bar(self._console)
            self._progress.start()
            self._rounds = self._progress.add_task("rounds ", total=config.rounds, note="")
            self._devices = self._progress.add_task("devices", total=config.sampled, note="")

    def round_started(self, round: int, devices: Sequence[int]) -> None:
        if self._progress:
            self._progress.update(self._rounds, completed=round - 1)
            self._progress.reset(self._devices, total=len(devices), note="")

    def device_done(self, round: int, device: int, outcome: str) -> None:
        if self._progress:
            self._progress.advance(self._devices)
        if outcome != TRAINED:
            reason = "ran out of memory" if outcome == OUT_OF_MEMORY else "failed"
            self.warning(f"round {round}: device {device} {reason}")

    def round_done(self, record: RoundRecord) -> None:
        self._records.append(record)
        note = f"virtual {clock(record.clock_seconds)}"
        last = next((each for each in reversed(self._records) if each.accuracy is not None), None)
        if last and last.accuracy is not None and last.smoothed_accuracy is not None:
            note += f"  {self._accuracy()} {last.accuracy:.3f}, smoothed {last.smoothed_accuracy:.3f}"
        if self._progress:
            self._progress.update(self._rounds, completed=record.round, note=note)
        elif record.accuracy is not None:
            total = self._plan.config.rounds if self._plan else 0
            self._console.print(f"round {record.round}/{total}  sparsity floor {record.floor_ratio:.0%}  {note}")

    def _accuracy(self) -> str:
        return accuracy_name(self._plan.config.task if self._plan else "classification")

    def evaluating(self, done: int, total: int) -> None:
        if self._progress:
            if done == 1:
                self._progress.reset(self._devices, total=total, description="evaluate", note="devices' own models")
            self._progress.update(self._devices, completed=done)
        elif done == 1:
            self._console.print(f"evaluating the devices' own models: {total} different structures")

    def warning(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._console.print(f"warning: {escape(text)}", style="yellow")

    def close(self) -> None:
        """Stop the progress bar; the terminal is as it was."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def finished(self, summary: Mapping[str, Any], directory: Path) -> None:
        self.close()
        self._console.print(_summary_table(summary))
        if self._plan and self._records:
            self._console.print(_types_table(self._plan.device_types, self._records))
            if self._profiled:
                workers = self._plan.workers if self._plan.engine == "ray" else 1
                self._console.print(_profile_table(profile(self._records, workers)))
        self._console.print(
            f"[bold]{escape(str(directory))}[/]: curves.png, summary.json, rounds.jsonl, config.toml, checkpoint/\n"
            f"TensorBoard: tensorboard --logdir {escape(str(directory / 'tensorboard'))}"
        )


def progress_bar(console: Console) -> Progress:
    """Bars with a count, a `note` and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def clock(seconds: float) -> str:
    """12.3 s, 4m 05s, 2h 03m."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m {int(seconds % 60):02d}s"
    return f"{int(seconds // 3600)}h {int(seconds % 3600 // 60):02d}m"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _summary_table(summary: Mapping[str, Any]) -> Table:
    table = Table(title="result", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    reached, accuracy = summary["time_to_target_seconds"], accuracy_name(summary["task"])
    rows = {
        "global model": f"{accuracy} {summary['final_accuracy']:.3f}, smoothed (averaged adapters) "
        f"{summary['smoothed_accuracy']:.3f}",
        "devices' own models": f"mean {summary['device_accuracy_mean']:.3f}, sd {summary['device_accuracy_sd']:.3f}, "
        f"worst {summary['device_accuracy_min']:.3f}"
        + (f" (of {summary['devices_evaluated']})" if summary["devices_evaluated"] < summary["devices"] else ""),
        **_language_rows(summary),
        "sparsity": f"{summary['sparsity_prunable']:.1%} of the prunable parameters, "
        f"{summary['sparsity_total']:.1%} of the whole model",
        "virtual time": clock(summary["virtual_seconds"])
        + (
            ""
            if summary["target_accuracy"] is None
            else f", to {summary['target_accuracy']:.2f}: {clock(reached) if reached is not None else 'not reached'}"
        ),
        "waiting (virtual)": f"{clock(summary['mean_waiting_seconds'])} per device and round",
        "traffic": f"{size(summary['uploaded_bytes'])} up, {size(summary['downloaded_bytes'])} down",
        "wall time": f"{clock(summary['wall_seconds'])} of rounds, {clock(summary['startup_seconds'])} start-up",
        "peak memory here": size(summary["peak_rss_bytes"]),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _language_rows(summary: Mapping[str, Any]) -> dict[str, str]:
    if summary["task"] != "causal-lm":
        return {}
    rows = {
        "perplexity": f"{summary['final_perplexity']:.2f}, smoothed {summary['smoothed_perplexity']:.2f}, devices' own "
        f"models {summary['device_perplexity_mean']:.2f}; cut but never tuned {summary['perplexity_cut_untuned']:.2f}"
    }
    if "answers" in summary:
        rows["answers"] = (
            f"ROUGE-L {summary['answers_rouge_l']:.3f}, {summary['answers_exact_match']:.0%} exact, of "
            f"{summary['answers']} from the evaluation set"
        )
    return rows


def _types_table(types: Sequence[str], records: Sequence[RoundRecord]) -> Table:
    table = Table(title="what the policy gave to whom", title_justify="left")
    for heading in ("device type", "rounds", "mean rank", "mean sparsity", "mean virtual time"):
        table.add_column(heading, justify="left" if heading == "device type" else "right")
    pulls = [pull for record in records for pull in record.pulls if pull.report.outcome == TRAINED]
    for name in sorted(set(types)):
        own = [pull for pull in pulls if types[pull.device] == name]
        if own:
            table.add_row(
                name,
                str(len(own)),
                f"{sum(pull.action.lora_rank for pull in own) / len(own):.1f}",
                f"{sum(pull.ratio_after for pull in own) / len(own):.0%}",
                clock(sum(pull.report.seconds for pull in own) / len(own)),
            )
    return table


def _profile_table(parts: Mapping[str, float]) -> Table:
    table = Table(title="where the wall time of the rounds went (all workers together)", title_justify="left")
    for heading in ("part", "seconds", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, share in shares(parts).items():
        table.add_row(name, f"{parts[name]:.2f}", f"{share:.1%}")
    return table
