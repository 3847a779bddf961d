"""The memory formula of `fedspine study plan` against measured peaks.

    .venv/bin/python -m benchmarks.estimator [--out FILE.json]

Random models of eight shapes, each in float32, in bfloat16 and with half of its heads and channels cut: two steps on
random tokens of full length, one thread. A process per shape; what counts is its largest resident set (VmHWM) of the
training, less what it had before the model was made. Allocator as in `benchmarks/memory.py`.
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
from fedspine.data.encode import Batch
from fedspine.lora.adapters import narrow, start_adapters
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.importance import MagnitudeScorer
from fedspine.pruning.select import select
from fedspine.stopwatch import Stopwatch
from fedspine.structure import Structure
from fedspine.study.design import Cell, compression
from fedspine.study.estimate import workload_for
from fedspine.study.memory import training_bytes
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
COMPRESSIONS = ("none", "bf16", "width:0.5")
TINY = ("classification", 48, 2, 2, 16, 4)


def measure(shape: tuple[Any, ...], level: str) -> tuple[int, float]:
    """(measured bytes, estimated bytes)."""
    family, task, hidden, layers, rows, length, rank = shape
    before = resident_bytes("VmRSS")
    kind, ratio = compression(level)
    config = RunConfig(task=task, max_length=length, batch_size=rows, min_rank=1, max_rank=rank, fixed_rank=rank)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden}
    settings = AutoConfig.for_model(family, **{**COMMON, **sizes}, num_attention_heads=max(1, hidden // 64))
    settings.use_cache = False
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    model = auto.from_config(settings).eval()
    resident = ResidentModel(model, family, config.lora_targets, rank, 2.0, dtype)
    full, rng = Structure.full(resident.shape), np.random.default_rng(0)
    arrays = start_adapters(resident.shape, rank, rng) | resident.head_arrays()
    resident.mount(full, narrow(arrays, full, rank, resident.shape))
    if ratio:
        cut = select(full, MagnitudeScorer(resident).scores(), ratio, resident.shape)
        resident.mount(cut, narrow(arrays, cut, rank, resident.shape), own=True)
    ids = rng.integers(5, COMMON["vocab_size"], (2, rows, length))
    labels = ids if task == "causal-lm" else rng.integers(2, size=(2, rows))
    batches = [Batch(tokens, np.ones_like(tokens), None, right) for tokens, right in zip(ids, labels, strict=True)]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    tune(resident, LocalOptimizer(resident, 1e-3, 1.0), batches, lambda: None, lambda _: None, Stopwatch())
    estimate = training_bytes(workload_for(Cell({"compression": level}, 0), config, resident.shape), ratio, rank)
    return resident_bytes("VmHWM") - before, estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape:
        torch.set_num_threads(1)
        shape = json.loads(options.shape)
        for level in COMPRESSIONS:
            measure((shape[0], *TINY), level)  # what the libraries need
        for level in COMPRESSIONS:
            gc.collect()
            print(json.dumps([level, *measure(tuple(shape), level)]), flush=True)
        return
    rows = []
    print(f"{'family, task, hidden, layers, batch, length, rank':52s} {'':10s} {'MB':>6s} {'estimate / measured':>20s}")
    for shape in SHAPES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.estimator", "--shape", json.dumps(shape)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **STEADY},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for level, measured, estimate in map(json.loads, done.stdout.splitlines()):
            rows.append({"shape": shape, "compression": level, "bytes": measured, "estimate": estimate})
            text = ", ".join(map(str, shape))
            print(f"{text:52s} {level:10s} {measured / 1e6:6.0f} {estimate / measured:20.2f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
