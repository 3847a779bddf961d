"""The client's side of a round: cut, tune, score, cut again, recover, report. Pure functions of a request.

The base model, the tokenizer and the encoded data stay in the process, keyed by the configuration, so that only
adapters and structures travel. In a simulation one process stands in for many devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.controller.schedule import warmup_rounds
from fedspine.cost import FLOAT_BYTES, Workload, workload_of
from fedspine.data.encode import Batch, Encoded, balanced_sample, encode, evaluation_batches, training_batches
from fedspine.data.language import encode_language
from fedspine.data.prepared import PreparedData, Rows, find, prepare
from fedspine.devices.clock import VirtualMeter, device_state
from fedspine.devices.population import Population, load_population
from fedspine.logit_adjustment import logit_shift
from fedspine.lora.adapters import narrow, nbytes, rank_of, ranks_of, start_adapters, widen
from fedspine.lora.factors import BOTH, completed, known_to, of_sides, shared, trained_sides
from fedspine.lora.norms import update_norm
from fedspine.lora.proximal import Proximal
from fedspine.lora.rank_salience import RankSalience
from fedspine.lora.rank_tail import RankTail, kept_rank
from fedspine.lora.resident import ResidentModel
from fedspine.model import load_base, load_tokenizer
from fedspine.pruning.importance import SCORERS, TaylorScorer
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

EVALUATION_BATCH = 64
PROBE_PART = 8
MOST_LOGITS = 2**25
"""That an evaluation batch of a language model may have: 128 MB in float32."""
DEVICES_KEPT = 128
"""Devices whose rows stay tokenized in a process."""


@dataclass(frozen=True)
class Workbench:
    """All that stays in a process for one configuration."""

    config: RunConfig
    data: PreparedData
    test: Encoded
    of_device: Callable[[int], Encoded]
    """The training rows of a device."""
    resident: ResidentModel
    population: Population
    pad_id: int
    public: Encoded | None = None
    """Texts to distil on, where the run does."""

    @property
    def shape(self) -> ModelShape:
        return self.resident.shape

    @property
    def workload(self) -> Workload:
        return workload_of(self.config, self.shape)

    @cached_property
    def start(self) -> Arrays:
        """Adapters that change nothing yet, in full coordinates, and the head as it was loaded: every machine's."""
        rng = generator(self.config.seed, 0, 0, Purpose.ADAPTERS)
        return start_adapters(self.shape, self.config.max_rank, rng) | self.resident.head_arrays()

    def training_batches(self, device: int, round: int, iterations: int) -> Iterator[Batch]:
        """The mini-batches of a device's local round; all devices of a round take the same turns."""
        seed = self.config.seed
        rng = generator(seed, round, device, Purpose.BATCHES)
        turns = generator(seed, round, 0, Purpose.BATCH_ORDER)
        return training_batches(self.of_device(device), self.config.batch_size, iterations, rng, self.pad_id, turns)

    def evaluation_batches(self, rows: Encoded, most: int = EVALUATION_BATCH) -> Iterator[Batch]:
        """Every row once, at most `most` together."""
        logits_of_row = self.config.max_length * max(1, self.shape.vocabulary)
        return evaluation_batches(rows, max(1, min(most, MOST_LOGITS // logits_of_row)), self.pad_id)


def configure_threads(threads: int) -> None:
    """Torch threads of this process: matrix products differ in their last bit between thread counts."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def workbench(settings: str) -> Workbench:
    """Load model and data for a configuration (JSON) once per process.

    Errors: `DataError`, `ModelError`, `PopulationError`.
    """
    config = RunConfig.from_json(settings)
    configure_threads(config.threads)
    population = load_population(config.population, config.devices)
    tokenizer = load_tokenizer(config)
    data = find(settings) or prepare(config)
    pad_id = tokenizer.pad_token_id or 0
    model, family = load_base(config, len(data.classes), pad_id)
    resident = ResidentModel(
        model,
        family,
        config.lora_targets,
        config.max_rank,
        config.lora_scale,
        getattr(torch, config.dtype),
        config.torch_device,
        config.gradient_checkpointing,
    )

    def tokens(rows: Rows, index: NDArray[np.int64]) -> Encoded:
        pairs = rows.pairs.take(index) if rows.pairs else None
        encoder = encode_language if config.task == "causal-lm" else encode
        return encoder(tokenizer, rows.texts.take(index), pairs, rows.labels[index], config.max_length)

    return Workbench(
        config=config,
        data=data,
        test=tokens(data.test, np.arange(len(data.test))),
        of_device=lru_cache(DEVICES_KEPT)(lambda device: tokens(data.train, data.owned[device])),
        resident=resident,
        population=population,
        pad_id=pad_id,
        public=tokens(data.train, data.public) if len(data.public) else None,
    )


@dataclass(frozen=True)
class Local:
    """A device's part in a round, before it trains."""

    request: TrainRequest
    data: Encoded
    meter: VirtualMeter
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
        upload_arrays = of_sides(arrays, trained_sides(config.trained_factors, request.round))
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
            rank_after=rank_of(arrays, bench.shape),
            module_salience=salience,
            wall=wall,
        )
        return TrainReply(request.device, report, structure, upload_arrays, scores)


def train(request: TrainRequest, own: bool = False) -> TrainReply:
    """A device's local round. Out of memory is an outcome, not an error.

    `own`: the process serves one device only, and need not keep what that device has cut.
    """
    bench = _bench_for(request)
    configure_threads(bench.config.threads)
    watch = Stopwatch()
    local = begin(request, bench)
    return local if isinstance(local, TrainReply) else tuned(local, bench, watch, own)


def begin(request: TrainRequest, bench: Workbench) -> Local | TrainReply:
    """Download what the request holds; the reply of a device whose memory is too small for it."""
    config, workload, shape = bench.config, bench.workload, bench.shape
    meter = VirtualMeter(device_state(bench.population, config.seed, request.device, request.round))
    arrays = completed(request.arrays, known_to(request, config, bench.start, shape), request.structure, shape)
    needed = workload.memory_bytes(request.structure, workload.mean_rank(ranks_of(arrays, shape)))
    download = _traffic(request.arrays, request.structure, request.scores, config)
    download += workload.change_bytes(request.missed_rank)
    report = Report(
        TRAINED,
        examples=len(bench.data.owned[request.device]),
        download_bytes=download,
        download_seconds=meter.download_seconds(download),
        peak_memory_bytes=int(needed),
    )
    if meter.out_of_memory(needed):
        message = f"needs {needed / 1e6:.0f} MB of {meter.state.memory_bytes / 1e6:.0f} MB"
        failed = replace(report, outcome=OUT_OF_MEMORY, message=message)
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
        resident.mount(request.structure, request.arrays, own=own, trained=trained)
    with watch.part("probe batch"):
        probe = probe_batch(local, bench)
        _, loss_before, _ = evaluate(resident, probe)
    left = kept_rank(request.action.lora_rank, config.rank_decay, config.min_rank)
    tail = RankTail(resident, left) if config.rank_decay < 1.0 else None
    near = Proximal(resident, config.proximal) if config.proximal else None
    penalties = [each for each in (near, tail) if each]
    optimizer = LocalOptimizer(resident, config.learning_rate, config.clip_norm, penalties)
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
        flops += bench.workload.iteration_flops(counts, ranks)
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
    """Time a local iteration, or a part of its batch, and a small transfer, before the round's choice is made."""
    bench = workbench(request.settings)
    config = bench.config
    meter = VirtualMeter(device_state(bench.population, config.seed, request.device, request.round))
    return meter.probe(
        config.probe_share * bench.workload.iteration_flops(request.structure.counts(), request.lora_rank)
    )


def evaluate_device(request: EvaluateRequest, own: bool = False) -> EvaluateReply:
    """Accuracy of a device's own cut model with the given adapters, on the evaluation set. `own`: see `train`."""
    bench = _bench_for(request)
    configure_threads(bench.config.threads)
    arrays = completed(request.arrays, bench.start, request.structure, bench.shape)
    bench.resident.mount(request.structure, arrays, merge=True, own=own)
    accuracy, loss, _ = evaluate(bench.resident, bench.evaluation_batches(bench.test))
    return EvaluateReply(request.device, len(bench.test), accuracy, loss)


def _traffic(arrays: Arrays, structure: Structure, scores: Scores | None, config: RunConfig) -> int:
    """Bytes of what is sent; of what was folded into the weights, the workload knows."""
    sent = nbytes(shared(of_sides(arrays, BOTH), config.trained_factors)) + structure.nbytes
    return sent + (0 if scores is None else sum(part.nbytes for layer in scores for part in layer))


def _bench_for(request: TrainRequest | EvaluateRequest) -> Workbench:
    """Loaded again when this process has given up what the request's structure keeps.

    A device that failed after it was cut is sent the structure from before.
    """
    bench = workbench(request.settings)
    if not bench.resident.held.contains(request.structure):
        workbench.cache_clear()
        bench = workbench(request.settings)
    return bench


def _cut_ratio(request: TrainRequest, config: RunConfig, cut: int, shape: ModelShape) -> float | None:
    """Ratio to reach at the round's cut number `cut` (the server made number 0), or None when there is none."""
    cuts = config.cuts_in(request.action.steps(config.local_iterations))
    if cut >= cuts:
        return None
    start = request.structure.sparsity(shape)
    return start + cut / (cuts - 1) * max(0.0, request.action.pruning_ratio - start)
