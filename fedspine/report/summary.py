"""The figures of a finished run, and the warning for one that went wrong."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import psutil

from fedspine.config import RunConfig
from fedspine.structure import ModelShape
from fedspine.types import OUT_OF_MEMORY, TRAINED, RoundRecord

COLLAPSED_SHARE = 0.95


def iterations_text(config: RunConfig) -> str:
    """How many local iterations a device does in a round."""
    least, most = config.iterations_bounds
    return f"{least}" if least == most else f"{least} to {most}"


def accuracy_name(task: str) -> str:
    """What is counted: texts, or tokens."""
    return "token accuracy" if task == "causal-lm" else "accuracy"


def summarise(
    config: RunConfig,
    records: Sequence[RoundRecord],
    *,
    device_accuracies: Sequence[float],
    device_sparsities: Sequence[float],
    shape: ModelShape,
    engine: str,
    workers: int,
    startup_seconds: float,
    peak_rss_bytes: int,
) -> dict[str, Any]:
    """`summary.json`. Times named `virtual_` and the waiting time are the devices'; those named `wall_` this machine's.
    With cost = measured the former are measured on the devices.

    `time_to_target_seconds` is the virtual time at which the smoothed accuracy crosses the target, on the straight
    line between two evaluations; null when it does not.
    """
    pulls = [pull for record in records for pull in record.pulls]
    evaluated = [record for record in records if record.accuracy is not None]
    sparsity = statistics.fmean(device_sparsities)
    return {
        "method": config.method,
        "task": config.task,
        "policy": config.policy,
        "seed": config.seed,
        "devices": config.devices,
        "rounds": len(records),
        "engine": engine,
        "workers": workers,
        "threads": config.threads,
        "final_accuracy": evaluated[-1].accuracy if evaluated else None,
        "smoothed_accuracy": evaluated[-1].smoothed_accuracy if evaluated else None,
        "devices_evaluated": len(device_accuracies),
        "device_accuracy_mean": statistics.fmean(device_accuracies),
        "device_accuracy_sd": statistics.pstdev(device_accuracies),
        "device_accuracy_min": min(device_accuracies),
        "sparsity_prunable": sparsity,
        "sparsity_prunable_min": min(device_sparsities),
        "sparsity_total": sparsity * shape.prunable_parameters / shape.total_parameters,
        "target_accuracy": config.target_accuracy or None,
        "virtual_seconds": records[-1].clock_seconds if records else 0.0,
        "time_to_target_seconds": time_to_target(records, config.target_accuracy),
        "mean_waiting_seconds": statistics.fmean(record.waiting_seconds for record in records) if records else 0.0,
        "uploaded_bytes": sum(record.uploaded_bytes for record in records),
        "downloaded_bytes": sum(record.downloaded_bytes for record in records),
        "devices_that_took_part": len({pull.device for pull in pulls if pull.report.outcome == TRAINED}),
        "late_replies": sum(pull.round < record.round for record in records for pull in record.pulls),
        "device_memory_bytes": max((pull.report.peak_memory_bytes for pull in pulls), default=0),
        "out_of_memory": sum(pull.report.outcome == OUT_OF_MEMORY for pull in pulls),
        "wall_seconds": sum(record.wall["seconds"] for record in records),
        "startup_seconds": startup_seconds,
        "local_compute_seconds": sum(pull.report.wall.get("seconds", 0.0) for pull in pulls),
        "peak_rss_bytes": peak_rss_bytes,
    }


def time_to_target(records: Sequence[RoundRecord], target: float) -> float | None:
    """First virtual second at which the smoothed accuracy reaches `target`; 0 or never gives None."""
    if target <= 0:
        return None
    smoothed = ((record.clock_seconds, record.smoothed_accuracy) for record in records)
    return crossing([(seconds, accuracy) for seconds, accuracy in smoothed if accuracy is not None], target)


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where the straight lines between (seconds, accuracy) points first reach `target`; None if they never do."""
    before: tuple[float, float] | None = None
    for now in curve:
        if now[1] >= target:
            if before is None or now[1] == before[1]:
                return now[0]
            return before[0] + (now[0] - before[0]) * (target - before[1]) / (now[1] - before[1])
        before = now
    return None


def collapse_warning(records: Sequence[RoundRecord], largest_class_share: float) -> str | None:
    """A text when the last two evaluated rounds gave nearly every example to one class that is not that common."""
    shares = [record.predicted_share for record in records if record.predicted_share is not None][-2:]
    if len(shares) < 2 or min(shares) < COLLAPSED_SHARE or largest_class_share >= COLLAPSED_SHARE:
        return None
    return (
        f"the global model gives {shares[-1]:.0%} of the evaluation set to one class (the most common class has "
        f"{largest_class_share:.0%}): the federation has collapsed. Strong label skew does this; try a larger "
        "dirichlet_alpha, a smaller learning_rate or fewer local_iterations"
    )


class PeakMemory:
    """Largest resident memory of this process and its children, over the moments it was looked at."""

    def __init__(self) -> None:
        self.bytes = 0

    def look(self) -> None:
        process = psutil.Process()
        total = process.memory_info().rss
        for child in process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        self.bytes = max(self.bytes, total)
