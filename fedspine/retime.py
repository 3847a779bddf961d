"""The rounds of a finished run under another population's clock: no training, where nothing looked at the times.

A method whose policy never asks for times makes the same choices on any devices, so it trains the same model; only the
seconds differ. They are computed again, record by record, from what the device computed and moved. Equal to a new run
up to the rounding of floats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from fedspine.config import RunConfig, saved_config
from fedspine.controller.reward import reward_pulls
from fedspine.devices.clock import VirtualMeter, device_state, type_names
from fedspine.devices.population import population_of
from fedspine.devices.profiles import Population
from fedspine.report.curves import draw_curves
from fedspine.report.records import read_records, record_to_line, write_atomically
from fedspine.report.summary import time_to_target
from fedspine.types import OUT_OF_MEMORY, TRAINED, Pull, RoundRecord

TIME_BLIND = {
    "policy": ("fixed", "random"),
    "sampling": ("uniform",),
    "local_work": ("equal",),
    "slow_layers": (0,),
    "close_at": (1.0,),
}
"""Values of the keys that could look at times, or at rewards, which hold times, and do not."""


def retime_run(source: Path, config: RunConfig, directory: Path) -> bool:
    """Write the run of `config` into `directory` from that of `source`, if the two differ in the population only.

    Whether it could: not for choices that see times, an unfinished or other run, devices that come and go, or that lack
    memory in one of the two. The new directory has no checkpoint: its model is that of `source`.
    """
    blind = all(getattr(config, key) in values for key, values in TIME_BLIND.items())
    if not blind or not (source / "summary.json").is_file():
        return False
    before = saved_config(source)
    if replace(before, population=config.population) != config:
        return False
    old, new = (population_of(each) for each in (before, config))
    if old.availability or new.availability:  # who takes part then depends on the clock
        return False
    records = retimed(read_records(source / "rounds.jsonl"), config, old, new)
    if records is None:
        return False
    summary = json.loads((source / "summary.json").read_text(encoding="utf-8")) | {
        "virtual_seconds": records[-1].clock_seconds,
        "time_to_target_seconds": time_to_target(records, config.target_accuracy),
        "mean_waiting_seconds": fmean(record.waiting_seconds for record in records),
        "trained_on_population": before.population,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.toml", config.to_toml().encode())
    write_atomically(directory / "rounds.jsonl", "".join(record_to_line(each) + "\n" for each in records).encode())
    draw_curves(records, config, type_names(new, config.seed), directory / "curves.png")
    write_atomically(directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return True


def retimed(
    records: Sequence[RoundRecord], config: RunConfig, old: Population, new: Population
) -> list[RoundRecord] | None:
    """The records with the times of `new` instead of `old`; None where a device's memory decides otherwise there."""
    done: list[RoundRecord] = []
    past: list[Pull] = []
    for record in records:
        pulls = []
        for pull in record.pulls:
            was, now = (VirtualMeter(device_state(each, config.seed, pull.device, record.round)) for each in (old, new))
            if now.out_of_memory(pull.report.peak_memory_bytes) != (pull.report.outcome == OUT_OF_MEMORY):
                return None
            pulls.append(_retimed_pull(pull, config.local_iterations, was, now))
        pulls = list(reward_pulls(config.reward, config.target_sparsity, past, pulls))
        past += pulls
        times = [pull.report.seconds for pull in pulls]
        slowest = max(times)
        done.append(
            replace(
                record,
                pulls=tuple(pulls),
                round_seconds=slowest,
                clock_seconds=(done[-1].clock_seconds if done else 0.0) + slowest,
                waiting_seconds=sum(slowest - seconds for seconds in times) / len(times),
            )
        )
    return done


def _retimed_pull(pull: Pull, iterations: int, was: VirtualMeter, now: VirtualMeter) -> Pull:
    report = replace(pull.report, download_seconds=now.download_seconds(pull.report.download_bytes))
    if report.outcome == TRAINED:
        busy = report.compute_seconds / was.state.jitter - iterations * was.state.iteration_seconds
        flops = busy * was.state.flops_per_second
        report = replace(
            report,
            compute_seconds=now.compute_seconds(flops, iterations),
            upload_seconds=now.upload_seconds(report.upload_bytes),
        )
    return replace(pull, report=report)
