"""The client's side of a round: cut, tune, score, cut again, recover, report. Pure functions of a request.

In a simulation one process stands in for many devices, on one workbench.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedspine.allocator import keep_freed_memory
from fedspine.config import RunConfig
from fedspine.controller.schedule import warmup_rounds
from fedspine.cost import FLOAT_BYTES
from fedspine.data.encode import Batch, Encoded, balanced_sample
from fedspine.devices.clock import Meter, VirtualMeter, device_state
from fedspine.devices.measured import MeasuredMeter, Start
from fedspine.logit_adjustment import logit_shift
from fedspine.lora.adapters import above, narrow, nbytes, rank_of, ranks_of, widen
from fedspine.lora.factors import BOTH, completed, known_to, of_sides, on_the_wire, shared, trained_sides
from fedspine.lora.norms import update_norm
from fedspine.lora.proximal import Proximal
from fedspine.lora.rank_salience import RankSalience
from fedspine.lora.rank_tail import RankTail, kept_rank
from fedspine.pruning.importance import SCORERS, TaylorScorer, mask_scores
from fedspine.pruning.scoreboard import blend
from fedspine.pruning.select import select
from fedspine.randomness import Purpose, generator
from fedspine.stopwatch import Stopwatch
from fedspine.structure import ModelShape, Structure
from fedspine.training import LocalOptimizer, evaluate, tune
from fedspine.types import (
    FAILED,
    OUT_OF_MEMORY,
    TRAINED,
    Arrays,
    EvaluateReply,
    EvaluateRequest,
    Probe,
    ProbeRequest,
    Report,
    Scores,
    TrainReply,
    TrainRequest,
)
from fedspine.workbench import Workbench, configure_threads, workbench

PROBE_PART = 8
TIMED_STEPS = 4
"""Local iterations of a measurement."""


@dataclass(frozen=True)
class Local:
    """A device's part in a round, before it trains."""

    request: TrainRequest
    data: Encoded
    meter: Meter
    report: Report

    def finished(
        self,
        bench: Workbench,
        structure: Structure,
        arrays: Arrays,
        scores: Scores | None,
        losses: tuple[float, float],
        flops: float,
        wall: Mapping[str, float],
        salience: tuple[float, ...] = (),
    ) -> TrainReply:
        """The reply after training. `losses`: on the probe batch, before and after."""
        config, request, meter = bench.config, self.request, self.meter
        if not np.isfinite(losses).all():
            message = f"the loss became {losses[1]}: the training diverged; try a smaller learning_rate"
            failed = replace(self.report, outcome=FAILED, message=message)
            return TrainReply(request.device, failed, request.structure, {}, None)
        start = narrow(widen(request.arrays, request.structure, bench.shape), structure, config.max_rank, bench.shape)
        first = request.action.first_layer(bench.shape.layers)
        trained = of_sides(above(arrays, first, bench.shape), trained_sides(config.trained_factors, request.round))
        upload_arrays = on_the_wire(trained, config)
        if scores is not None and first:
            scores = mask_scores(scores, structure.above(first))
        upload = _traffic(upload_arrays, structure, scores, config) + FLOAT_BYTES * len(salience)
        flops += bench.workload.change_flops(request.missed_rank)
        report = replace(
            self.report,
            compute_seconds=meter.compute_seconds(flops, request.action.steps(config.local_iterations)),
            upload_bytes=upload,
            upload_seconds=meter.upload_seconds(upload),
            loss_before=losses[0],
            loss_after=losses[1],
            update_norm=update_norm(start, arrays, bench.shape, config.lora_scale),
            peak_memory_bytes=meter.peak_memory_bytes(self.report.peak_memory_bytes),
            rank_after=rank_of(arrays, bench.shape),
            module_salience=salience,
            wall=wall,
        )
        return TrainReply(request.device, report, structure, upload_arrays, scores)


def train(request: TrainRequest, own: bool = False) -> TrainReply:
    """A device's local round. Out of memory is an outcome, not an error.

    `own`: the process serves one device only, and need not keep what that device has cut. What runs out then is the
    device's memory; in a simulation it is that of the machine that simulates.
    """
    try:
        return _train(request, own)
    except Exception as error:
        if own and ran_out_of_memory(error):
            message = " ".join(f"ran out of memory while training: {error}".split())
            return TrainReply(request.device, Report(OUT_OF_MEMORY, message=message), request.structure, {}, None)
        raise


def ran_out_of_memory(error: Exception) -> bool:
    """Python's error, or one of PyTorch's: on a CPU that is an ordinary `RuntimeError`."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _train(request: TrainRequest, own: bool) -> TrainReply:
    began = Start() if own else None
    bench = workbench(request.settings)
    configure_threads(bench.config.threads)
    if not own:
        keep_freed_memory()
    watch = Stopwatch()
    local = begin(request, bench, began)
    return local if isinstance(local, TrainReply) else tuned(local, bench, watch, own)


def meter_of(
    bench: Workbench, request: TrainRequest | ProbeRequest, began: Start | None = None
) -> VirtualMeter | MeasuredMeter:
    """Of the run's clock. `began`: what is measured counts from there; None: from now on.

    Errors: `FederationError` when a device is to measure that has no means to.
    """
    if bench.config.cost == "measured":
        return MeasuredMeter(began or Start())
    return VirtualMeter(device_state(bench.population, bench.config.seed, request.device, request.round))


def begin(request: TrainRequest, bench: Workbench, began: Start | None = None) -> Local | TrainReply:
    """Download what the request holds; the reply of a device that drops out, or lacks memory for it.

    `began`: as of `meter_of`.
    """
    config, workload, shape = bench.config, bench.workload, bench.shape
    meter = meter_of(bench, request, began)
    arrays = completed(request.arrays, known_to(request, config, bench.start, shape), request.structure, shape)
    first = request.action.first_layer(shape.layers)
    needed = workload.memory_bytes(request.structure, workload.mean_rank(ranks_of(arrays, shape)), first)
    download = _traffic(request.arrays, request.structure, request.scores, config)
    download += workload.change_bytes(request.missed_rank)
    report = Report(
        TRAINED,
        examples=len(bench.data.owned[request.device]),
        download_bytes=download,
        download_seconds=meter.download_seconds(download),
        peak_memory_bytes=int(needed),
    )
    if refusal := meter.refusal(needed):
        failed = replace(report, outcome=refusal[0], message=refusal[1])
        return TrainReply(request.device, failed, request.structure, {}, None)
    return Local(replace(request, arrays=arrays), bench.of_device(request.device), meter, report)


def measures_importance(config: RunConfig, round: int) -> bool:
    """Whether devices score heads and channels in a round: Taylor scores are too dear to go on after the warm-up."""
    return config.target_sparsity > 0 and (config.importance != "taylor" or round <= warmup_rounds(config))


def next_structure(
    request: TrainRequest, bench: Workbench, iteration: int, now: Structure, own: Callable[[], Scores] | None
) -> Structure | None:
    """What to cut to before a local iteration, or None; `own`: the device's scores so far, where it measures any."""
    config = bench.config
    if not iteration or iteration % config.prune_interval or request.scores is None or config.target_sparsity == 0:
        return None
    ratio = _cut_ratio(request, config, iteration // config.prune_interval, bench.shape)
    if ratio is None:
        return None
    scores = request.scores if own is None or config.masks == "shared" else blend(own(), request.scores, 5)
    return select(now, scores, ratio, bench.shape, config.layer_budget)


def probe_batch(local: Local, bench: Workbench) -> list[Batch]:
    """A device's fixed, class-balanced probe batch: one-label mini-batches would mostly measure label skew.

    In parts of like length, which halves the padding.
    """
    rng = generator(bench.config.seed, 0, local.request.device, Purpose.PROBE_BATCH)
    rows = balanced_sample(local.data.labels, bench.config.probe_examples, rng)
    return list(bench.evaluation_batches(local.data.take(rows), PROBE_PART))


def tuned(local: Local, bench: Workbench, watch: Stopwatch, own: bool = False) -> TrainReply:
    """The local round of a device that has what it needs. `own`: see `train`."""
    config, resident, request = bench.config, bench.resident, local.request
    with watch.part("mount"):
        trained = trained_sides(config.trained_factors, request.round)
        first = request.action.first_layer(bench.shape.layers)
        resident.mount(request.structure, request.arrays, own=own, trained=trained, first_layer=first)
    with watch.part("probe batch"):
        probe = probe_batch(local, bench)
        _, loss_before, _ = evaluate(resident, probe)
    left = kept_rank(request.action.lora_rank, config.rank_decay, config.min_rank)
    tail = RankTail(resident, left) if config.rank_decay < 1.0 else None
    near = Proximal(resident, config.proximal) if config.proximal else None
    penalties = [each for each in (near, tail) if each]
    rate = config.learning_rate_in(request.round)
    factor = config.adapter_factor(request.action.lora_rank)
    optimizer = LocalOptimizer(resident, rate, config.clip_norm, penalties, factor * rate)
    scorer = SCORERS[config.importance](resident, config.seed) if measures_importance(config, request.round) else None
    salience = RankSalience(resident) if config.rank_growth > 1.0 else None
    observers = [each.observe for each in (scorer, salience) if each]
    ranks = ranks_of(request.arrays, bench.shape)
    flops = 0.0

    def before_step(iteration: int) -> None:
        nonlocal flops
        structure = next_structure(request, bench, iteration, resident.structure, scorer.scores if scorer else None)
        if structure is not None:
            optimizer.cut(structure)
        counts = resident.structure.counts()
        flops += bench.workload.iteration_flops(counts, ranks, first)
        if isinstance(scorer, TaylorScorer):
            flops += bench.workload.weight_gradient_flops(counts)

    def observe() -> None:
        for each in observers:
            each()

    try:
        shift = logit_shift(local.data.labels, len(bench.data.classes), config.logit_adjustment)
        batches = bench.training_batches(request.device, request.round, request.action.steps(config.local_iterations))
        tune(resident, optimizer, batches, observe, before_step, watch, shift)
        scores = scorer.scores() if scorer else None
    finally:
        if scorer:
            scorer.close()
    with watch.part("probe batch"):
        _, loss_after, _ = evaluate(resident, probe)
    arrays, structure = resident.arrays(), resident.structure
    if tail:
        arrays = tail.dropped(arrays)
    measured = salience.values() if salience else ()
    losses = loss_before, loss_after
    return local.finished(bench, structure, arrays, scores, losses, flops, watch.seconds(), measured)


def probe(request: ProbeRequest) -> Probe:
    """Time a local iteration, or a part of its batch, and a small transfer, before the round's choice is made.

    A measured probe times whole iterations, and takes the rates of the link from what has been sent so far.
    """
    bench = workbench(request.settings)
    meter = meter_of(bench, request)
    flops = bench.workload.iteration_flops(request.structure.counts(), request.lora_rank)
    if isinstance(meter, VirtualMeter):
        return meter.probe(bench.config.probe_share * flops)
    seconds = iteration_seconds(bench, request.device, request.structure, request.lora_rank)
    return Probe(seconds / flops, meter.seconds_per_byte, meter.compute_seconds(flops, 1), 0)


def iteration_seconds(bench: Workbench, device: int, structure: Structure, rank: int) -> float:
    """Wall time of a local iteration on this machine: the mean of a few, after one to warm up."""
    config = bench.config
    bench.resident.mount(structure, narrow(bench.start, structure, rank, bench.shape))
    optimizer = LocalOptimizer(bench.resident, config.learning_rate, config.clip_norm)
    batches = list(bench.training_batches(device, 0, 1 + TIMED_STEPS))
    tune(bench.resident, optimizer, batches[:1])
    began = time.perf_counter()
    tune(bench.resident, optimizer, batches[1:])
    return (time.perf_counter() - began) / TIMED_STEPS


def evaluate_device(request: EvaluateRequest, own: bool = False) -> EvaluateReply:
    """Accuracy of a device's own cut model with the given adapters, on the evaluation set. `own`: see `train`."""
    bench = workbench(request.settings)
    configure_threads(bench.config.threads)
    arrays = completed(request.arrays, bench.start, request.structure, bench.shape)
    bench.resident.mount(request.structure, arrays, merge=True, own=own)
    accuracy, loss, _ = evaluate(bench.resident, bench.evaluation_batches(bench.test))
    return EvaluateReply(request.device, len(bench.test), accuracy, loss)


def _traffic(arrays: Arrays, structure: Structure, scores: Scores | None, config: RunConfig) -> int:
    """Bytes of what is sent; of what was folded into the weights, the workload knows."""
    sent = nbytes(shared(of_sides(arrays, BOTH), config.trained_factors)) + structure.nbytes
    return sent + (0 if scores is None else sum(part.nbytes for layer in scores for part in layer))


def _cut_ratio(request: TrainRequest, config: RunConfig, cut: int, shape: ModelShape) -> float | None:
    """Ratio to reach at the round's cut number `cut` (the server made number 0), or None when there is none."""
    cuts = config.cuts_in(request.action.steps(config.local_iterations))
    if cut >= cuts:
        return None
    start = request.structure.sparsity(shape)
    return start + cut / (cuts - 1) * max(0.0, request.action.pruning_ratio - start)
