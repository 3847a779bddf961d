"""`fedspine.schedule`: the scheduler alone. No training, no model: a response surface answers in place of the devices.

Sampling, candidates, policy, reward and the virtual clock are those of `fedspine.simulate`; what a local round brings
is drawn from a `Surface`, and a cut hits its ratio exactly. An idle device costs a few bytes, so a million of them
fit. Directory: `config.toml`, `schedule.jsonl` (one `ScheduledRound` per line, written as it goes), `summary.json`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedspine.config import RunConfig, configured
from fedspine.config_rules import check_simulated
from fedspine.controller.cohort import choose_devices, gather
from fedspine.controller.history import History
from fedspine.controller.policy import make_policy, rank_grid
from fedspine.controller.reward import cut_share, log_reference, with_rewards
from fedspine.controller.schedule import allowed_range, check_quorum, floor_ratio
from fedspine.cost import workload_of
from fedspine.devices.clock import VirtualMeter, absent, device_state, idle_bytes
from fedspine.devices.population import population_of
from fedspine.errors import ConfigError
from fedspine.late import Awaited, Closing, close_round
from fedspine.minilm_shape import minilm_shape
from fedspine.pruning.select import check_reachable
from fedspine.randomness import Purpose, generator
from fedspine.report.records import write_atomically
from fedspine.report.summary import PeakMemory
from fedspine.run_directory import free_directory
from fedspine.surface import DEFAULT, Surface
from fedspine.types import OUT_OF_MEMORY, TRAINED, Action, Candidate, Probe, Pull, Report

MEMORY_LOOKS = 50
"""Moments in a run at which its memory is looked at."""


@dataclass(frozen=True)
class ScheduledRound:
    """One line of `schedule.jsonl`. Means are over the round's devices. Equal seeds give equal lines."""

    round: int
    floor_ratio: float
    clock_seconds: float
    """Virtual seconds so far: the sum of the slowest devices' times, probes included."""
    waiting_seconds: float
    """Mean of (round time - own time)."""
    mean_rank: float
    mean_sparsity: float
    """After the round."""
    mean_quality: float
    progress: float
    """Sum of all qualities so far."""
    worth: float
    """Sum so far of what the surface expects of the local rounds, without noise and without what cutting adds, which in
    the end is the same for all: what policies are compared by."""
    out_of_memory: int


@dataclass(frozen=True)
class ScheduleResult:
    directory: Path
    summary: dict[str, Any]


def schedule(
    config: RunConfig | str | Path | None = None,
    *,
    surface: Surface | str | Path | None = None,
    out: str | Path | None = None,
    on_round: Callable[[ScheduledRound], None] | None = None,
    **keys: Any,
) -> ScheduleResult:
    """Run the rounds of a configuration without training.

    `config`, `keys`, `out`: as for `fedspine.simulate`. `surface`: a `Surface`, the directory of a finished run to fit
    one to, or nothing for `fedspine.surface.DEFAULT`. `on_round` hears of every round.

    Errors: subclasses of `FedSpineError`; for a configuration that cannot run, before anything is written.
    """
    began = time.perf_counter()
    config = configured(config, keys)
    check_simulated(config)
    if not isinstance(surface, Surface):
        surface = DEFAULT if surface is None else Surface.of_run(Path(surface))
    directory = free_directory(out, "schedule", resumable=False)
    scheduler = _Scheduler(config, surface)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.toml", config.to_toml().encode())
    peak = PeakMemory()
    peak.look()
    started = time.perf_counter()
    waiting, lost = 0.0, 0
    with open(directory / "schedule.jsonl", "w", encoding="utf-8", buffering=1) as file:
        for number in range(1, config.rounds + 1):
            line = scheduler.play(number)
            file.write(json.dumps(asdict(line), separators=(",", ":")) + "\n")
            waiting += line.waiting_seconds
            lost += line.out_of_memory
            if number % math.ceil(config.rounds / MEMORY_LOOKS) == 0:
                peak.look()
            if on_round:
                on_round(line)
    summary = {
        "policy": config.policy,
        "seed": config.seed,
        "devices": config.devices,
        "sampled": config.sampled,
        "rounds": config.rounds,
        "virtual_seconds": line.clock_seconds,
        "progress": line.progress,
        "progress_per_virtual_second": line.progress / line.clock_seconds,
        "worth": line.worth,
        "mean_waiting_seconds": waiting / config.rounds,
        "devices_that_took_part": scheduler.history.devices_seen,
        "out_of_memory": lost,
        "surface": {**asdict(surface), "weights": list(surface.weights)},
        "planning_ms_per_round": 1e3 * scheduler.planning_seconds / config.rounds,
        "wall_seconds": time.perf_counter() - started,
        "startup_seconds": started - began,
        "bytes_per_idle_device": scheduler.idle_bytes / config.devices,
        "peak_rss_bytes": peak.bytes,
    }
    write_atomically(directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return ScheduleResult(directory, summary)


class _Scheduler:
    """A federation whose devices are a clock and a surface."""

    def __init__(self, config: RunConfig, surface: Surface) -> None:
        for key, none in (("fold", "none"), ("rank_growth", 1.0), ("slow_layers", 0)):
            if (value := getattr(config, key)) != none:
                raise ConfigError(f"{key} = {value!r}: what this costs follows from training; use fedspine simulate")
        self.config, self.surface = config, surface
        shape = minilm_shape(config)
        check_reachable(config.target_sparsity, shape)
        self.workload = workload_of(config, shape)
        self.population = population_of(config)
        self.policy = make_policy(config, self.workload, self._true_seconds)
        self.ranks = rank_grid(config.min_rank, config.max_rank)
        try:
            self.history = History(config.devices, config.rounds * config.sampled)
        except (MemoryError, ValueError):
            raise ConfigError(
                f"rounds = {config.rounds}: with sampled = {config.sampled} there is no memory for so many pulls"
            ) from None
        self.idle_bytes = self.history.idle_bytes + idle_bytes(self.population, config.seed)
        self.planning_seconds = 0.0
        self._meters: dict[int, VirtualMeter] = {}
        """Of the devices of the round that is played."""
        self._called: dict[int, Probe] = {}
        self._late: tuple[Awaited, ...] = ()
        self._log_reference: float | None = None
        self._clock_seconds = 0.0
        self._progress = 0.0
        self._worth = 0.0

    def play(self, number: int) -> ScheduledRound:
        """One round, from sampling to reward. Errors: `FederationError` when the quorum is missed."""
        config = self.config
        began = time.perf_counter()
        called = self._roll_call() if number == 1 else 0.0
        fleet = self.history.fleet
        late = {each.pull.device for each in self._late}
        busy, waited = gather(config, self._clock_seconds, late, partial(absent, self.population, config.seed))
        devices = choose_devices(config, number, self.workload, lambda: fleet().with_roll_call(self._called), busy)
        self.planning_seconds += time.perf_counter() - began
        self._meters = {
            device: VirtualMeter(device_state(self.population, config.seed, device, number)) for device in devices
        }
        before = self.history.sparsities(devices)
        probes = self._probe(devices, before)
        began = time.perf_counter()
        known = [
            probe or (None if timed else self._called.get(device))
            for device, probe, timed in zip(devices, probes, self.history.timed(devices), strict=True)
        ]
        candidates = [
            Candidate(device, ratio, *allowed_range(config, number, ratio), self.ranks, probe)
            for device, ratio, probe in zip(devices, before, known, strict=True)
        ]
        past = self.history.pulls(devices)
        actions = self.policy.suggest(number, candidates, past, (config.seed, number, 0, int(Purpose.POLICY)))
        self.planning_seconds += time.perf_counter() - began
        pulls = [self._pull(number, *one) for one in zip(devices, actions, before, probes, strict=True)]
        check_quorum(config, number, len(pulls), [pull.report for pull in pulls])
        closing = close_round(config.close_at, [Awaited(pull, pull.seconds) for pull in pulls], self._late)
        self._late = closing.late
        pulls = [each.pull for each in closing.arrived]
        self._log_reference = log_reference(self._log_reference, pulls)
        reference = math.exp(self._log_reference) if self._log_reference is not None else 0.0
        pulls = list(with_rewards(config.reward, pulls, self._qualities(number, pulls), reference))
        self.history.add(pulls)
        self._clock_seconds += called + waited
        return self._line(number, pulls, closing)

    def _roll_call(self) -> float:
        """Measure all devices, where the configuration asks for it; the seconds of the slowest."""
        config = self.config
        if not config.uses_roll_call:
            return 0.0
        flops = config.probe_share * float(self.workload.planned_flops(0.0, float(config.fixed_rank)))
        flops /= config.local_iterations
        self._called = {
            device: VirtualMeter(device_state(self.population, config.seed, device, 1)).probe(flops)
            for device in range(config.devices)
        }
        return max(probe.seconds for probe in self._called.values())

    def _probe(self, devices: list[int], ratios: list[float]) -> list[Probe | None]:
        """A measurement of every device that has to be probed, None for the others."""
        if not self.config.uses_probe:
            return [None] * len(devices)
        first = self.config.probe == "first"
        seen = [
            first and (met or one in self._called) for one, met in zip(devices, self.history.seen(devices), strict=True)
        ]
        flops = self.workload.planned_flops(np.array(ratios), np.array(float(self.config.fixed_rank)))
        per_iteration = self.config.probe_share * flops / self.config.local_iterations
        return [
            None if known else self._meters[device].probe(float(count))
            for device, known, count in zip(devices, seen, per_iteration, strict=True)
        ]

    def _pull(self, number: int, device: int, action: Action, before: float, probe: Probe | None) -> Pull:
        report = self._report(number, device, action, before)
        after = action.pruning_ratio if report.outcome == TRAINED else before
        flops = self.workload.planned_flops(after, action.lora_rank) * self.workload.flops_share(action)
        return Pull(number, device, action, before, after, report, flops, probe)

    def _report(self, number: int, device: int, action: Action, before: float) -> Report:
        """Times and bytes of a local round: the cuts before iterations 0, K, 2K, ... share what is to be cut."""
        config, workload, meter = self.config, self.workload, self._meters[device]
        iterations, rank = action.steps(config.local_iterations), action.lora_rank
        cuts = config.cuts_in(iterations)
        ratios = np.linspace(before + (action.pruning_ratio - before) / cuts, action.pruning_ratio, cuts)
        first = float(ratios[0])
        scores = workload.score_bytes if cuts > 1 and number > 1 else 0
        download = int(workload.download_bytes(first, rank)) + workload.structure_bytes + scores
        received = meter.download_seconds(download)
        needed = workload.planned_memory_bytes(first, rank)
        if refusal := meter.refusal(needed):
            outcome, message = refusal
            return Report(outcome, download_bytes=download, download_seconds=received, message=message)
        starts = [cut * config.prune_interval for cut in range(cuts)]
        shares = np.diff([*starts, iterations]) / config.local_iterations
        flops = float(shares @ workload.planned_flops(ratios, np.full(cuts, float(rank))))
        upload = int(workload.upload_bytes(action.pruning_ratio, rank)) + workload.structure_bytes
        upload += workload.score_bytes
        return Report(
            TRAINED,
            compute_seconds=meter.compute_seconds(flops, iterations),
            download_seconds=received,
            upload_seconds=meter.upload_seconds(upload),
            download_bytes=download,
            upload_bytes=upload,
        )

    def _true_seconds(self, round: int, device: int, ratio: float, rank: int) -> float:
        """What no policy but the clairvoyant one may know: of a device of the round that is played."""
        (before,) = self.history.sparsities([device])
        return self._report(round, device, Action(ratio, rank), before).seconds

    def _qualities(self, number: int, pulls: list[Pull]) -> list[float]:
        """Drawn from the surface: the same noise for the same seed, round and place in it, whatever was chosen.

        The surface knows full local rounds. A shorter one is worth its share of the iterations, a longer one as much as
        a full one: the least they can be, as later steps bring less.
        """
        target = self.config.target_sparsity
        expected = self.surface.quality(
            [pull.action.lora_rank for pull in pulls],
            [pull.ratio_after for pull in pulls],
            [cut_share(target, pull.ratio_before, pull.ratio_after) for pull in pulls],
            number / self.config.rounds,
        )
        noise = generator(self.config.seed, number, 0, Purpose.SURFACE).standard_normal(len(pulls))
        return [float(quality) for quality in self._shares(pulls) * (expected + self.surface.sigma * noise)]

    def _shares(self, pulls: list[Pull]) -> NDArray[np.float64]:
        """Of the configured local iterations that each did, at most all of them [pulls]."""
        return np.array([min(1.0, self.workload.share(pull.action)) for pull in pulls])

    def _line(self, number: int, pulls: list[Pull], closing: Closing[Awaited]) -> ScheduledRound:
        """A late reply's progress is discounted as its weight would be."""
        self._clock_seconds += float(closing.seconds)
        discounts = np.array([each.discount(number, self.config.max_staleness) for each in closing.arrived])
        self._progress += float(discounts @ [pull.quality for pull in pulls])
        trained = [pull.report.outcome == TRAINED for pull in pulls]
        choices = [pull.action.lora_rank for pull in pulls], [pull.ratio_after for pull in pulls]
        worth = self.surface.quality(*choices, 0.0, number / self.config.rounds)
        self._worth += float((discounts * trained * self._shares(pulls)) @ worth)
        return ScheduledRound(
            round=number,
            floor_ratio=floor_ratio(self.config, number),
            clock_seconds=self._clock_seconds,
            waiting_seconds=fmean(closing.seconds - each.seconds for each in closing.arrived),
            mean_rank=fmean(pull.action.lora_rank for pull in pulls),
            mean_sparsity=fmean(pull.ratio_after for pull in pulls),
            mean_quality=fmean(pull.quality for pull in pulls),
            progress=self._progress,
            worth=self._worth,
            out_of_memory=sum(pull.report.outcome == OUT_OF_MEMORY for pull in pulls),
        )
