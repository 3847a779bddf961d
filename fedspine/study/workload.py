"""The cost formulas of a cell: those of every run, with what its learner trains and how its weights are kept.

Quantised are the projections of all layers; embeddings, norms and head stay in float32, and so does the arithmetic.
Libraries dequantise a matrix for each product, and take memory themselves: on a small model more than is saved.
"""

from __future__ import annotations

from dataclasses import replace

from fedspine.config import RunConfig
from fedspine.cost import FLOAT_BYTES, Workload, workload_of
from fedspine.structure import ModelShape
from fedspine.study.design import Cell, Point, compression

PEFT_LEARNERS = ("ia3", "prompt", "prefix")
"""Learners beside LoRA: on a user's own device only."""
WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.5 + (1 + FLOAT_BYTES / 256) / 64}
"""Of a quantised weight: int8 (arXiv 2208.07339), or nf4 with a scale of 8 bits for every 64 (arXiv 2305.14314)."""
QUANTISER_BYTES = 48e6
"""Of bitsandbytes 0.50 in a process that has torch and transformers (measured on a CPU)."""
TIME_FACTOR = {"int8": 3.7, "nf4": 3.7}
"""Of a training step, over float32."""
TIME_SOURCE = "nf4 measured on a CPU (134 M parameters, 1,024 tokens), int8 taken to be as slow"


def workload_for(cell: Cell, config: RunConfig, shape: ModelShape) -> Workload:
    """The cost formulas of a cell, for `lora_rank`: on the device too a weight takes what it takes here."""
    workload = workload_of(config, shape)
    levels = cell.levels
    kind, _ = compression(levels["compression"] or "none")
    if kind == "bf16":
        workload = replace(workload, frozen_bytes=FLOAT_BYTES / 2, activation_bytes=FLOAT_BYTES / 2)
    if kind in WEIGHT_BYTES:
        of_layer = shape.heads * shape.head_weights + shape.channels * shape.channel_weights
        saved = (FLOAT_BYTES - WEIGHT_BYTES[kind]) * shape.layers * of_layer
        dequantised = FLOAT_BYTES * shape.channels * shape.hidden
        whole = FLOAT_BYTES * shape.total_parameters - saved + dequantised + QUANTISER_BYTES
        workload = replace(workload, frozen_bytes=whole / shape.total_parameters)
    learner, rank = levels.get("learner"), int(levels.get("rank") or 0)
    if learner in PEFT_LEARNERS:
        trained = shape.head_bytes + FLOAT_BYTES * _values(str(learner), shape, rank)
        workload = replace(workload, shape=replace(shape, head_bytes=trained))
    if learner == "prompt":
        workload = replace(workload, length=workload.length + rank)
    return replace(workload, prefix=rank) if learner == "prefix" else workload


def lora_rank(levels: Point) -> int:
    """Of the adapters in the formulas; 0 without LoRA."""
    return 0 if levels["learner"] in PEFT_LEARNERS else int(levels["rank"] or 0)


def step_flops(cell: Cell, workload: Workload, counts: tuple[tuple[float, float], ...]) -> float:
    """FLOPs of a training step, or as many as take as long. `counts`: kept (heads, channels) per layer."""
    kind, _ = compression(cell.levels["compression"] or "none")
    return TIME_FACTOR.get(kind, 1.0) * workload.iteration_flops(counts, lora_rank(cell.levels))


def _values(learner: str, shape: ModelShape, rank: int) -> int:
    """That a learner trains besides the head."""
    key = shape.heads * shape.head_dim // shape.queries  # as many features as all keys, or all values, of a layer
    if learner == "prompt":
        return rank * shape.hidden
    if learner == "prefix":
        return rank * shape.layers * 2 * key
    from fedspine.pruning.families import family_of

    queries = shape.heads * shape.head_dim if "qkv" in family_of(shape.family).roles else 0
    return shape.layers * (queries + 2 * key + shape.channels)
