"""This machine as a device of a study, from one timed step: seconds of other steps follow by the FLOP formula.

The estimator is that of every device (`VirtualMeter.compute_seconds`, `Workload.iteration_flops`): shapes, lengths,
ranks and cuts are in the FLOPs, and what one step took gives the speed. How well that predicts other steps:
`benchmarks/estimator.py --time`.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import process_time

import numpy as np
import torch

from fedspine.config import RunConfig
from fedspine.data.encode import Batch
from fedspine.data.prepared import shared
from fedspine.devices.profiles import USABLE
from fedspine.errors import ConfigError
from fedspine.lora.adapters import narrow
from fedspine.lora.resident import ResidentModel
from fedspine.report.records import write_atomically
from fedspine.structure import Structure
from fedspine.study.design import load_study
from fedspine.study.run import plan_study
from fedspine.study.tasks import personal_task
from fedspine.training import LocalOptimizer, tune
from fedspine.workbench import workbench

STEPS = 4
DEVICE = """# Written by `fedspine study calibrate`: a local step of {model} took {milliseconds:.1f} ms on this machine
# ({rows} x {length} tokens, rank {rank}, {threads} torch threads, float32). Links are a guess: Wi-Fi.
jitter = 0
bandwidth_sigma = 0
download_mbps = [20]
upload_mbps = [10]
[[types]]
name = "this machine"
count = 1
gflops = {gflops:.4g}
memory_mb = {memory_mb:.0f}
iteration_ms = 0
"""


def full_batches(resident: ResidentModel, config: RunConfig, count: int) -> list[Batch]:
    """Random tokens, every row of full length: what the FLOP formula counts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, resident.model.config.vocab_size, (count, config.batch_size, config.max_length))
    labels = ids if config.task == "causal-lm" else rng.integers(2, size=(count, config.batch_size))
    return [Batch(tokens, np.ones_like(tokens), None, right) for tokens, right in zip(ids, labels, strict=True)]


def step_seconds(resident: ResidentModel, config: RunConfig) -> float:
    """Of the fastest of some local steps of the mounted model, the first one left out.

    Processor time by thread: the wall time of a machine that does nothing else, whatever else it does.
    """
    optimizer, seconds = LocalOptimizer(resident, config.learning_rate, config.clip_norm), []
    for batch in full_batches(resident, config, 1 + STEPS):
        began = process_time()
        tune(resident, optimizer, [batch])
        seconds.append(process_time() - began)
    return min(seconds[1:]) / torch.get_num_threads()


def calibrate(path: str | Path, out: str | Path) -> float:
    """Time a step of a study's first cell that trains, and write this machine as a device. Returns its GFLOP/s.

    Errors: `ConfigError` when nothing trains or `out` cannot be written; what `fedspine study plan` raises.
    """
    study, target = load_study(path), Path(out)
    if target.exists() or not target.absolute().parent.is_dir():
        raise ConfigError(f"--out {target}: must be a new file in a folder that exists")
    plan = next((plan for plan in plan_study(study) if plan.estimate.steps and plan.config.dtype == "float32"), None)
    if plan is None:
        raise ConfigError(f"{path}: no cell trains in float32, so there is no step to time; add learner = 'lora'")
    config, levels = plan.config, plan.cell.levels
    task = personal_task(str(levels["task"]), study.tasks, study.users, plan.cell.seed)
    data, _ = task.data(int(levels["examples"]), study.test_examples)
    workbench.cache_clear()
    with shared(data, config.to_json()):
        bench = workbench(config.to_json())
    full = Structure.full(bench.shape)
    bench.resident.mount(full, narrow(bench.start, full, config.max_rank, bench.shape))
    seconds = step_seconds(bench.resident, config)
    gflops = bench.workload.iteration_flops(full.counts(), config.max_rank) / seconds / 1e9
    text = DEVICE.format(
        model=config.model,
        milliseconds=1e3 * seconds,
        rows=config.batch_size,
        length=config.max_length,
        rank=config.max_rank,
        threads=config.threads,
        gflops=gflops,
        memory_mb=USABLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6,
    )
    write_atomically(target, text.encode())
    return gflops
