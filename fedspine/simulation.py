"""`fedspine.simulate`: one call from a configuration to a finished federation in a run directory.

Run directory: `config.toml` (complete), `rounds.jsonl`, `checkpoint/`, `summary.json`, `tensorboard/`,
`curves.png`. A killed run continues from its directory with `resume`, and ends as if it had not been.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedspine.checkpoint import FILE, load_state, save_state
from fedspine.client_round import iteration_seconds
from fedspine.config import RunConfig, configured
from fedspine.config_rules import check_deployable, check_layers, check_simulated
from fedspine.controller.policy import make_policy
from fedspine.controller.schedule import floor_ratio
from fedspine.data.prepared import shared
from fedspine.devices.clock import VirtualMeter, absent, device_state, type_names
from fedspine.distillation import distilled
from fedspine.errors import CheckpointError, ConfigError
from fedspine.exchange import Exchange
from fedspine.federation import (
    Evaluation,
    Federation,
    ServerState,
    run_rounds,
)
from fedspine.final import evaluate_devices, prune_everyone
from fedspine.flower.cluster import find_cluster
from fedspine.flower.engines import check_engine, run_federation
from fedspine.generation import check_metrics, language_figures
from fedspine.group_round import check_groupable, groupable
from fedspine.lora.adapters import narrow
from fedspine.pruning.select import check_reachable
from fedspine.report.curves import draw_curves
from fedspine.report.observer import Observer, RunPlan, Silent
from fedspine.report.records import append_record, read_records, truncate_records, write_atomically
from fedspine.report.summary import PeakMemory, collapse_warning, summarise
from fedspine.report.tensorboard import Curves
from fedspine.run_directory import free_directory, resumed_config
from fedspine.structure import Structure
from fedspine.training import evaluate
from fedspine.types import Arrays, ProbeRequest, RoundRecord
from fedspine.workbench import Workbench, configure_threads, workbench

OVERHEAD = 1.25
"""Evaluation, probe batches and aggregation, beside the local steps: for the expected time only."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    directory: Path
    summary: dict[str, Any]
    records: tuple[RoundRecord, ...]


def simulate(
    config: RunConfig | str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    engine: str = "inline",
    workers: int | None = None,
    address: str | None = None,
    observer: Observer | None = None,
    **keys: Any,
) -> RunResult:
    """Run a federation on simulated devices.

    `config`: a `RunConfig`, a TOML file, or nothing for the defaults; `keys` override single values.
    `out`: a new directory for the run; by default one under `runs/`. `resume`: a directory to continue instead.
    `engine`: `inline` (this process), `ray` (Flower's simulation runtime with `workers` processes), `grouped` (the
    devices of a round as one batch) or `auto` (`fastest_engine`). Inline and ray give the same bits with any number of
    workers, grouped the same result up to rounding. `workers` is 1 by default.
    `address`: HOST:PORT of a Ray cluster that runs already and has this machine in it; its machines are the workers,
    one per CPU or at most `workers`. Model and data must lie on every machine, at the same absolute path.

    Errors: subclasses of `FedSpineError`, before anything is written.
    """
    began = time.perf_counter()
    automatic = engine == "auto"
    if automatic:
        engine = "ray" if address is not None else "inline"  # until the configuration is known
    check_engine(engine, workers, address)
    if resume is not None:
        if config is not None or out is not None or keys:
            raise ConfigError("resume continues a run as it was configured: leave out config, out and keys")
        directory = Path(resume)
        config = resumed_config(directory)
    else:
        config = configured(config, keys)
        directory = free_directory(out, config.method)
    check_simulated(config)
    cluster = None
    if address is not None:
        _check_paths(config)
        cluster = find_cluster(address, workers, config.torch_device == "cuda")
        workers = cluster.division.workers
    elif automatic:
        engine = fastest_engine(config, workers or 1)
    workers = (workers or 1) if engine == "ray" else 1
    observer = observer or Silent()
    workbench.cache_clear()  # files may have changed since the last run of this process
    run = _Run(config, workbench(config.to_json()), directory, observer, engine, workers, PeakMemory())
    run.check()
    if engine == "grouped":
        check_groupable(config)
    state, records = run.restored() if resume is not None else run.fresh()
    observer.plan(run.plan())
    with shared(run.bench.data, config.to_json()) if engine == "ray" else nullcontext():
        outcome = run_federation(
            lambda exchange: run.execute(exchange, state, records, began),
            devices=config.devices,
            engine=engine,
            workers=workers,
            threads=config.threads,
            cluster=cluster,
        )
    observer.finished(outcome.summary, directory)
    return outcome


def fastest_engine(config: RunConfig, workers: int) -> str:
    """The engine that `auto` stands for: it depends on the configuration only, so that a run can be repeated.

    On a GPU and in bfloat16 one large batch is faster than many small ones; in float32 on a CPU it is slower, as its
    padding costs more than it saves (benchmarks/NOTES.md).
    """
    if groupable(config) and (config.torch_device == "cuda" or config.dtype == "bfloat16"):
        return "grouped"
    return "ray" if workers > 1 else "inline"


def run_server(
    config: RunConfig, exchange: Exchange, directory: str | Path | None = None, resume: bool = False
) -> None:
    """The server of a deployment: the same rounds over devices that joined by themselves.

    `directory`: of the run, new unless `resume` continues the one in it; by default a new one under `runs/`.
    """
    began = time.perf_counter()
    check_deployable(config)
    place = Path(directory) if resume and directory else free_directory(directory, config.method)
    bench = workbench(config.to_json())
    if config.task == "classification":  # for devices that have data of their own
        config = replace(config, classes=bench.data.classes)
    run = _Run(config, bench, place, Silent(), "deployment", config.sampled, PeakMemory())
    run.check()
    run.execute(exchange, *(run.restored() if resume else run.fresh()), began)


@dataclass(frozen=True)
class _Run:
    """The parts of one run, and what happens with them inside the server."""

    config: RunConfig
    bench: Workbench
    directory: Path
    observer: Observer
    engine: str
    workers: int
    peak: PeakMemory

    def check(self) -> None:
        """Errors: `ModelError` when the target sparsity cannot be reached, or answers cannot be measured.

        `ConfigError` for more layers than there are.
        """
        check_layers(self.config, self.bench.shape.layers)
        check_reachable(self.config.target_sparsity, self.bench.shape)
        if self.config.generate_examples:
            check_metrics(self.bench.data)

    def fresh(self) -> tuple[ServerState, tuple[RoundRecord, ...]]:
        """A new run directory and the state before round 1."""
        config, shape = self.config, self.bench.shape
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / "config.toml", config.to_toml().encode())
        arrays = self.bench.start
        return ServerState(0, arrays, arrays, Structure.full(shape)), ()

    def restored(self) -> tuple[ServerState, tuple[RoundRecord, ...]]:
        """The state of the last checkpoint, and the records up to it."""
        path = self.directory / "rounds.jsonl"
        if not (self.directory / FILE).exists() and len(read_records(path)) <= 1:
            # Killed before the first checkpoint: of the first round there may be a record, or a part of one.
            path.unlink(missing_ok=True)
            return self.fresh()
        state = load_state(self.directory, self.config, self.bench.shape)
        records = read_records(path)[: state.round]
        if len(records) != state.round:
            raise CheckpointError(f"{path} has {len(records)} rounds, the checkpoint {state.round}: it was edited")
        truncate_records(path, state.round)
        return state, tuple(records)

    def plan(self) -> RunPlan:
        """What will run, for the observer to show."""
        config, bench = self.config, self.bench
        workload = bench.workload
        full = Structure.full(bench.shape)
        return RunPlan(
            config=config,
            device_types=self._device_types(),
            trainable_parameters=int(workload.adapter_bytes(0.0, config.max_rank, workload.trained_share) / 4),
            prunable_parameters=bench.shape.prunable_parameters,
            total_parameters=bench.shape.total_parameters,
            smallest_message_bytes=int(workload.upload_bytes(config.target_sparsity, config.min_rank)),
            largest_message_bytes=int(workload.adapter_bytes(0.0, config.max_rank))
            + (workload.change_bytes(2**30) if config.fold != "none" else 0),  # in the end as whole matrices
            device_memory_bytes=int(workload.memory_bytes(full, config.max_rank)),
            expected_wall_seconds=self._expected_wall_seconds(),
            engine=self.engine,
            workers=self.workers,
            directory=self.directory,
        )

    def execute(
        self, exchange: Exchange, state: ServerState, records: Sequence[RoundRecord], began: float
    ) -> RunResult:
        """All rounds, the final cut and the evaluation of every device, and the files."""
        config, bench = self.config, self.bench
        configure_threads(config.threads)
        oracle = self._true_seconds if config.policy == "clairvoyant" else None
        federation = Federation(
            config=config,
            shape=bench.shape,
            workload=bench.workload,
            policy=make_policy(config, bench.workload, oracle),
            exchange=exchange,
            evaluate=self._evaluate,
            observer=self.observer,
            absent=partial(absent, bench.population, config.seed),
        )
        self._warm_up(exchange)
        startup_seconds = time.perf_counter() - began
        with Curves(self.directory / "tensorboard", state.round, config.cost) as curves:
            history = list(records)
            state, finished = run_rounds(federation, state, records, lambda s, r: self._save(s, r, curves, history))
        state = prune_everyone(federation, state, finished)
        if config.distill_steps:
            state = distilled(bench, state)
        devices = evaluate_devices(federation, state)
        save_state(self.directory, config, state)
        summary = summarise(
            config,
            finished,
            device_accuracies=[reply.accuracy for reply in devices],
            device_sparsities=[
                state.structures.get(device, Structure.full(bench.shape)).sparsity(bench.shape)
                for device in range(config.devices)
            ],
            shape=bench.shape,
            engine=self.engine,
            workers=self.workers,
            startup_seconds=startup_seconds,
            peak_rss_bytes=self.peak.bytes,
        )
        if config.task == "causal-lm":
            losses = [reply.loss for reply in devices]
            summary |= language_figures(bench, self._evaluate, bench.start, state, finished, losses)
        write_atomically(self.directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        draw_curves(finished, config, self._device_types(), self.directory / "curves.png")
        return RunResult(self.directory, summary, finished)

    def _expected_wall_seconds(self) -> float:
        """Of the rounds: a few local steps of the uncut model, timed here, scaled by what will be cut.

        With the most iterations that a deadline can give.
        """
        config, bench = self.config, self.bench
        workload = bench.workload
        step = iteration_seconds(bench, 0, Structure.full(bench.shape), config.fixed_rank)
        floors = [floor_ratio(config, round) for round in range(1, config.rounds + 1)]
        relative = sum(workload.planned_flops(floor, config.fixed_rank) for floor in floors)
        relative /= workload.planned_flops(0.0, config.fixed_rank)
        parallel = min(self.workers, config.sampled)
        return OVERHEAD * relative * config.sampled * config.iterations_bounds[1] * step / parallel

    def _device_types(self) -> tuple[str, ...]:
        if self.config.cost == "measured":
            return ("real",) * self.config.devices
        return type_names(self.bench.population, self.config.seed)

    def _warm_up(self, exchange: Exchange) -> None:
        """Let every worker load model and data before the clock of the rounds starts. A real device loads them anew
        for every message.
        """
        if self.engine == "deployment":
            return
        count = min(self.config.devices, 2 * self.workers if self.engine == "ray" else 1)
        full = Structure.full(self.bench.shape)
        settings = self.config.to_json()
        exchange.probe([ProbeRequest(1, device, full, self.config.fixed_rank, settings) for device in range(count)])

    def _save(self, state: ServerState, record: RoundRecord, curves: Curves, history: list[RoundRecord]) -> None:
        append_record(self.directory / "rounds.jsonl", record)
        save_state(self.directory, self.config, state)
        curves.add(record)
        history.append(record)
        self.peak.look()
        labels = np.bincount(self.bench.test.answers)
        warning = collapse_warning(history, float(labels.max() / labels.sum()))
        if warning and record.accuracy is not None:
            self.observer.warning(warning)

    def _evaluate(self, structure: Structure, arrays: Arrays) -> Evaluation:
        bench = self.bench
        bench.resident.mount(structure, narrow(arrays, structure, self.config.max_rank, bench.shape), merge=True)
        return Evaluation(*evaluate(bench.resident, bench.evaluation_batches(bench.test)))

    def _true_seconds(self, round: int, device: int, ratio: float, rank: int) -> float:
        """What the simulator knows and no policy but the clairvoyant one may."""
        workload, config = self.bench.workload, self.config
        meter = VirtualMeter(device_state(self.bench.population, config.seed, device, round))
        return (
            meter.compute_seconds(workload.planned_flops(ratio, rank), config.local_iterations)
            + meter.download_seconds(int(workload.download_bytes(ratio, rank)))
            + meter.upload_seconds(int(workload.upload_bytes(ratio, rank)) + workload.score_bytes)
        )


def _check_paths(config: RunConfig) -> None:
    """Errors: `ConfigError` for a relative path: the workers on a cluster start in another folder."""
    values = [("model", config.model), ("data", config.data)]
    values += [("population", part.strip()) for part in config.population.split(",")]
    for key, value in values:
        if value != getattr(RunConfig, key) and os.path.exists(value) and not os.path.isabs(value):
            raise ConfigError(
                f"{key} = {value!r}: with address this must be an absolute path, and exist on every machine; "
                f"here it is {os.path.abspath(value)!r}"
            )
