"""The estimates of `fedspine study plan` against what is measured: memory at its peak, seconds of a step.

    .venv/bin/python -m benchmarks.estimator [--time] [--only 0 4] [--out FILE.json]

Random models of eight shapes, each in float32, in bfloat16, with half of its heads and channels cut and with quantised
weights, tuned with LoRA; and in float32 with the other learners: two steps on random tokens of full length, one thread.
A process per shape; what counts is its largest resident set (VmHWM) of the training, less what it had before the model
was made. Allocator as in `benchmarks/memory.py`.

`--time`: seconds of the fastest of four steps instead, of the first three. One step calibrates, of the fourth shape
uncut, in float32 and in bfloat16; all others follow from it by their FLOPs. On a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.memory import COMMON, STEADY, resident_bytes
from fedspine.config import RunConfig
from fedspine.cost import Workload
from fedspine.lora.adapters import narrow, start_adapters
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.importance import MagnitudeScorer
from fedspine.pruning.select import select
from fedspine.published import Reader
from fedspine.structure import Structure
from fedspine.study.calibrate import full_batches, step_seconds
from fedspine.study.design import Cell, compression
from fedspine.study.memory import training_bytes
from fedspine.study.peft_learners import PeftLearner, is_peft
from fedspine.study.workload import QUANTISER_BYTES, WEIGHT_BYTES, lora_rank, step_flops, workload_for
from fedspine.training import LocalOptimizer, tune

SHAPES: tuple[tuple[str, str, int, int, int, int, int], ...] = (
    ("bert", "classification", 384, 6, 8, 64, 8),
    ("bert", "classification", 384, 6, 8, 256, 8),
    ("bert", "classification", 768, 6, 4, 128, 32),
    ("bert", "classification", 768, 12, 4, 128, 8),
    ("llama", "classification", 512, 8, 4, 256, 8),
    ("llama", "classification", 768, 8, 8, 128, 8),
    ("llama", "causal-lm", 384, 8, 4, 128, 8),
    ("llama", "causal-lm", 512, 12, 4, 256, 16),
)
"""Family, task, hidden, layers, batch, length, rank."""
CASES = (
    *(("lora", level) for level in ("none", "bf16", "width:0.5", "int8", "nf4")),
    *((learner, "none") for learner in ("ia3", "prompt", "prefix")),
)
"""Learner, compression."""
TINY = ("classification", 48, 2, 2, 16, 4)
CALIBRATION = SHAPES[3]
"""Of the middle in size, and of the rank that most have: thin products are slow, so a step at rank 32 tells less."""


def prepare(shape: tuple[Any, ...], learner: str, level: str) -> tuple[Cell, RunConfig, ResidentModel, Workload]:
    """A model that is ready to train, and its cost formulas."""
    family, task, hidden, layers, rows, length, rank = shape
    kind, ratio = compression(level)
    config = RunConfig(task=task, max_length=length, batch_size=rows, min_rank=1, max_rank=rank, fixed_rank=rank)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden}
    settings = AutoConfig.for_model(family, **{**COMMON, **sizes}, num_attention_heads=max(1, hidden // 64))
    settings.use_cache = False
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    model = auto.from_config(settings).eval()
    published: Reader = {}.__getitem__  # nothing that is cut here comes back
    resident = ResidentModel(model, family, config.lora_targets, rank, 2.0, dtype, published=published)
    full, rng = Structure.full(resident.shape), np.random.default_rng(0)
    arrays = start_adapters(resident.shape, rank, rng) | resident.head_arrays()
    resident.mount(full, narrow(arrays, full, rank, resident.shape))
    if ratio:
        cut = select(full, MagnitudeScorer(resident).scores(), ratio, resident.shape)
        resident.mount(cut, narrow(arrays, cut, rank, resident.shape), own=True)
    cell = Cell({"learner": learner, "compression": level, "rank": rank}, 0)
    return cell, config, resident, workload_for(cell, config, resident.shape)


def measure(shape: tuple[Any, ...], learner: str, level: str) -> tuple[int, float]:
    """(measured bytes, estimated bytes without the library that quantises: every process here has it)."""
    before = resident_bytes("VmRSS")
    cell, config, resident, workload = prepare(shape, learner, level)
    kind, ratio = compression(level)
    batches = full_batches(resident, config, 2)
    trained: Any = PeftLearner(cell.levels, config, resident) if is_peft(cell.levels) else resident
    del resident
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    tune(trained, LocalOptimizer(trained, 1e-3, 1.0), batches)
    estimate = training_bytes(workload, ratio, lora_rank(cell.levels))
    return resident_bytes("VmHWM") - before, estimate - (QUANTISER_BYTES if kind in WEIGHT_BYTES else 0.0)


def clock(shape: tuple[Any, ...], learner: str, level: str) -> tuple[float, float]:
    """(measured seconds of a step, its FLOPs)."""
    cell, config, resident, workload = prepare(shape, learner, level)
    return step_seconds(resident, config), step_flops(cell, workload, resident.structure.counts())


def of_shape(shape: tuple[Any, ...], timed: bool) -> dict[str, tuple[float, float]]:
    """By case, in a process of its own: (measured, estimate) or (measured, FLOPs)."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.estimator", "--shape", json.dumps(shape), *(["--time"] if timed else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1", **({} if timed else STEADY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {case: (measured, figure) for case, measured, figure in map(json.loads, done.stdout.splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--time", action="store_true", help="seconds of a step instead of memory")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="of the shapes, counted from 0")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args()
    figures = clock if options.time else measure
    if options.shape:
        torch.set_num_threads(1)
        shape = json.loads(options.shape)
        cases = CASES[:3] if options.time else CASES
        for case in cases:
            figures((shape[0], *TINY), *case)  # what the libraries need
        for case in cases:
            gc.collect()
            print(json.dumps([", ".join(case), *figures(tuple(shape), *case)]), flush=True)
        return
    seconds_per_flop = {}
    if options.time:
        of_one = of_shape(CALIBRATION, timed=True)
        seconds_per_flop = {case: seconds / flops for case, (seconds, flops) in of_one.items()}
        seconds_per_flop["lora, width:0.5"] = seconds_per_flop["lora, none"]
    rows = []
    unit, scale = ("ms", 1e3) if options.time else ("MB", 1e-6)
    print(f"{'family, task, hidden, layers, batch, length, rank':52s} {'':15s} {unit:>6s} {'estimate / measured':>20s}")
    for shape in (SHAPES[index] for index in options.only) if options.only else SHAPES:
        for case, (measured, figure) in of_shape(shape, options.time).items():
            estimate = figure * seconds_per_flop.get(case, 1.0)
            rows.append({"shape": shape, "case": case, "measured": measured, "estimate": estimate})
            text = ", ".join(map(str, shape))
            print(f"{text:52s} {case:15s} {measured * scale:6.0f} {estimate / measured:20.2f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
