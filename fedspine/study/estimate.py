"""What a cell needs on the study's device, before it runs: by the cost formulas of every run, and memory by its own.

A cell is infeasible when the memory formula, with a margin, exceeds what the device has; when the device cannot finish
one step in the budget; or when a user has too few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedspine.config import RunConfig
from fedspine.controller.schedule import floor_ratio
from fedspine.cost import FLOAT_BYTES, workload_of
from fedspine.devices.clock import VirtualMeter, device_state
from fedspine.devices.population import load_device
from fedspine.errors import ConfigError, FedSpineError
from fedspine.methods import METHODS
from fedspine.perturbation import UNPERTURBED, Perturbation, parse_perturbation
from fedspine.structure import ModelShape
from fedspine.study.design import DEFAULTS, Cell, Study, budget, compression
from fedspine.study.memory import training_bytes
from fedspine.study.retrieve import ENCODER_TOKENS
from fedspine.study.tasks import PersonalTask
from fedspine.study.workload import PEFT_LEARNERS, WEIGHT_BYTES, lora_rank, step_flops, workload_for

MARGIN = 1.25
"""Of memory, over the formula."""
CUTS = {"width": "magnitude", "fedspine": "fedspine"}
"""The method of a federation by compression, where that cuts heads and channels; `fedavg` of any other."""


@dataclass(frozen=True)
class Estimate:
    """Of one device, for its whole part in a cell."""

    steps: int
    """Optimiser steps; in a federation all rounds together."""
    memory_bytes: float
    """At its peak, without the margin."""
    seconds: float
    upload_bytes: float
    download_bytes: float
    infeasible: str = ""
    """Why the cell cannot run; empty when it can."""


@dataclass(frozen=True)
class CellPlan:
    """A cell with the configuration of its run, and its cost."""

    cell: Cell
    config: RunConfig
    federated_steps: int
    local_steps: int
    index_seconds: float
    """Of the device, to make the history searchable."""
    estimate: Estimate


def plan_cell(study: Study, cell: Cell, task: PersonalTask) -> CellPlan:
    """Errors: `ConfigError`, `ModelError`, `PopulationError` for what can be used in no cell."""
    config = cell_config(study, cell)
    levels, trouble = cell.levels, perturbation_of(cell)
    learner, (kind, share) = str(levels["learner"]), compression(levels["compression"] or "none")
    shape = _shape(config, len(task.classes), share if kind == "depth" else 0.0)
    ratio = share if kind in CUTS else kept_sparsity(config, shape) if kind == "ready" else 0.0
    workload, meter = workload_for(cell, config, shape), device_meter(study.device, trouble)
    trained, retrieves = learner not in ("none", "rag"), "rag" in learner
    rank = lora_rank(levels)
    reasons = list(_conflicts(cell, config, shape, len(task.classes), ratio))
    steps = federated = 0
    if trained:
        flops = step_flops(cell, workload, workload.planned_counts(ratio))
        step_seconds = device_meter(study.device).compute_seconds(flops, 1)  # what goes wrong is not planned
        amount, unit = budget(levels["budget"])
        steps = int(amount / {"steps": 1, "samples": config.batch_size, "seconds": step_seconds}[unit])
        if steps < 1:
            reasons.append(f"one step takes {step_seconds:.3g} s here, more than budget = {levels['budget']}")
        federated = {"local": 0, "federated": steps}.get(str(levels["scope"]), steps // 2)
    cut_at_once = kind in ("width", "ready") and not federated
    if trained and trouble.kind == "memory":  # it runs short half-way; what does not fit then ends there
        by_then = floor_ratio(config, 1 + config.rounds // 2) if levels["scope"] == "federated" else ratio
        if MARGIN * training_bytes(workload, by_then, rank) > trouble.share * meter.state.memory_bytes:
            steps = steps // 2 or steps
            federated = min(federated, steps)
    config, rounds = _with_rounds(config, federated, study.evaluations)
    federated = rounds * config.local_iterations
    local = 0 if levels["scope"] == "federated" else steps - federated
    seconds, memory = 0.0, workload.inference_bytes(ratio, rank)
    down = up = 0.0
    if trained:
        memory = training_bytes(workload, ratio if cut_at_once else 0.0, rank)
        seconds += meter.compute_seconds((federated + local) * flops, federated + local)
        down = workload.download_bytes(0.0, rank) + workload.structure_bytes
        up = workload.upload_bytes(0.0, rank) + workload.structure_bytes + workload.score_bytes
        seconds += rounds * (meter.download_seconds(down) + meter.upload_seconds(up))
    index_seconds = 0.0
    if retrieves:
        index_memory, index_seconds = _index(study, cell, config, meter)
        answers = trained or task.language
        memory = (max(memory, workload.inference_bytes(ratio, rank)) if answers else 0.0) + index_memory
        seconds += index_seconds
    if MARGIN * memory > meter.state.memory_bytes:
        have = meter.state.memory_bytes / 1e6
        reasons.append(f"needs {MARGIN * memory / 1e6:.0f} MB (margin included), and {study.device} has {have:.0f} MB")
    counted = workload_of(config, shape).planned_memory_bytes(0.0, rank)
    if federated and meter.out_of_memory(counted):
        have = meter.state.memory_bytes / 1e6
        reasons.append(f"in a federation it counts as {counted / 1e6:.0f} MB of {have:.0f} MB; use scope = local")
    if (trained or retrieves) and not levels["examples"]:
        reasons.append(f"examples = 0: {'retrieval from an empty history' if retrieves else 'nothing to learn from'}")
    if kind == "fedspine" and trained and not federated:
        remedy = "" if learner in PEFT_LEARNERS else "scope = federated, or "
        reasons.append(f"FedSpine cuts in a federation: use {remedy}compression = width:SHARE")
    if shortage := task.shortage(int(levels["examples"] or 0), study.test_examples):
        reasons.append(shortage)
    estimate = Estimate(federated + local, memory, seconds, rounds * up, rounds * down, "; ".join(reasons))
    return CellPlan(cell, config, federated, local, index_seconds, estimate)


def kept_sparsity(config: RunConfig, shape: ModelShape) -> float:
    """Share of the prunable parameters that a model's folder was exported without; 0 where its config.json knows."""
    from fedspine.artifact import cut_of

    cut = cut_of(config.model)
    layers = cut.layers if cut else ()
    kept = sum(heads * shape.head_parameters + channels * shape.channel_parameters for heads, channels in layers)
    return 1.0 - kept / shape.prunable_parameters if cut else 0.0


def _conflicts(cell: Cell, config: RunConfig, shape: ModelShape, classes: int, cut: float) -> Iterator[str]:
    """Levels that do not go together, with the remedy."""
    levels = cell.levels
    learner, (kind, _) = str(levels["learner"]), compression(levels["compression"] or "none")
    if levels["scope"] not in (None, "local"):
        if learner in PEFT_LEARNERS:
            yield f"FedSpine federates LoRA: use scope = local with learner = {learner}"
        elif kind in WEIGHT_BYTES:
            yield f"a quantised model is tuned on its own device: use scope = local with compression = {kind}"
        elif kind == "ready" and cut:
            yield "a model that was cut before is tuned on its own device: use scope = local, or a whole model"
    if learner == "prefix":
        if cut:
            yield "a prefix has keys and values for all heads, and some are cut: use compression = depth:SHARE"
        if shape.family == "distilbert":
            yield "DistilBERT takes no keys and values from outside: use learner = prompt"
        if config.gradient_checkpointing:
            yield "a prefix would be added twice: use gradient_checkpointing = false"
    if learner in ("prompt", "prefix"):
        try:
            _shape(replace(config, max_length=config.max_length + int(levels["rank"])), classes)
        except FedSpineError as error:
            yield f"rank = {levels['rank']} virtual tokens beside max_length = {config.max_length}: {error}"


def cell_config(study: Study, cell: Cell) -> RunConfig:
    """The run that a cell is, or would be in a federation."""
    levels = cell.levels
    kind, share = compression(levels["compression"] or "none")
    rank = lora_rank(levels) or 1
    method, model = CUTS.get(kind, "fedavg"), levels["model"] or RunConfig.model
    if kind == "ready":
        model = str(levels["compression"]).partition(":")[2]
        if not Path(model).is_dir():
            raise ConfigError(
                f"compression = 'ready:{model}': there is no such folder; name one that `fedspine export` wrote, or "
                "another model's"
            )
    own = {key: level for key, level in levels.items() if key not in (*DEFAULTS, "kind") and level is not None}
    values: dict[str, Any] = {**own, "task": levels.get("kind", RunConfig.task)}
    if values.get("perturbation", "none") != "none":
        values.setdefault("quorum", 0.0)  # what is lost counts, and ends nothing
        if parse_perturbation(values["perturbation"]).kind == "memory":
            values["perturbation"] = "none"  # `plan_cell` has seen to it
    values |= {"method": method, "seed": cell.seed, "data": str(levels["task"]), "partition": "iid", "min_classes": 1}
    values |= {"devices": study.users, "sampled": study.users, "population": study.device, "eval_devices": 1}
    values |= {"model": model, "dtype": "bfloat16" if kind == "bf16" else "float32"}
    values |= {"min_rank": rank, "max_rank": rank, "fixed_rank": rank}
    values.setdefault("local_work", "equal")  # the budget says how many steps
    values["target_sparsity"] = share if kind in CUTS else 0.0
    return RunConfig.from_values({**METHODS[method], **values})


def device_meter(name: str, trouble: Perturbation = UNPERTURBED) -> VirtualMeter:
    """The clock and the memory of the study's device, of those hit by a perturbation. Errors: `PopulationError`."""
    return VirtualMeter(device_state(replace(load_device(name), perturbation=trouble), 0, 0, 1))


def perturbation_of(cell: Cell) -> Perturbation:
    """What goes wrong in a cell."""
    return parse_perturbation(cell.levels.get("perturbation") or "none")


def model_parameters(model: str, classes: int, task: str = RunConfig.task) -> int:
    """Parameters of a model with a head of so many classes, or of a language model. Errors: `ModelError`."""
    return _shape_of(model, RunConfig.lora_targets, 4, classes, task).total_parameters


def _with_rounds(config: RunConfig, steps: int, evaluations: int) -> tuple[RunConfig, int]:
    """Rounds of `local_iterations` steps, at most, evaluated so many times; none for no steps."""
    if not steps:
        return config, 0
    iterations = min(config.local_iterations, steps)
    rounds = steps // iterations
    every = max(1, rounds // evaluations)
    return replace(config, local_iterations=iterations, rounds=rounds, eval_every=every), rounds


def _index(study: Study, cell: Cell, config: RunConfig, meter: VirtualMeter) -> tuple[float, float]:
    """(bytes, seconds) of making the history searchable and keeping it so, with the encoder that queries need."""
    items = int(cell.levels["examples"])
    if cell.levels["retriever"] == "bm25":
        return 2.0 * FLOAT_BYTES * items * config.max_length, 0.0
    read = replace(config, max_length=min(config.max_length, ENCODER_TOKENS))
    encoder = workload_of(read, _shape_of(study.encoder, config.lora_targets, 4, 2, RunConfig.task))
    batches = -(-items // config.batch_size)
    flops = batches * encoder.inference_flops(encoder.planned_counts(0.0))
    vectors = float(FLOAT_BYTES * items * encoder.shape.hidden)
    return encoder.inference_bytes(0.0) + vectors, meter.compute_seconds(flops, batches)


def _shape(config: RunConfig, classes: int, dropped: float = 0.0) -> ModelShape:
    return _shape_of(config.model, config.lora_targets, config.max_length, classes, config.task, dropped)


@lru_cache(maxsize=32)
def _shape_of(
    model: str, targets: tuple[str, ...], max_length: int, classes: int, task: str, dropped: float = 0.0
) -> ModelShape:
    from fedspine.model import model_shape

    config = RunConfig(task=task, model=model, lora_targets=targets, max_length=max_length)
    return model_shape(config, classes, dropped)
