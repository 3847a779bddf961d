"""Peak memory of one device's local round, against stock PEFT LoRA on the unpruned model.

    .venv/bin/python benchmarks/memory.py [--models minilm llama llama-lm] [--mapped] [--malloc default]
                                          [--device cuda] [--steps 2] [--out FILE.json]

MiniLM-L6 and a random Llama-shaped model of 110 M parameters, both with two classes, and the latter as a causal
language model; batches of 4 texts of 256 tokens, LoRA of rank 8 on q, v, o, up and down, float32, one thread. The
reference is `get_peft_model`, AdamW and a plain loop, with dropout off. The others are the round of a real device
(`client_round.tuned`): structure and adapters mounted, probe batch before and after, importance (Fisher) in every step,
clipping. "cut inside" starts at 30 % and cuts to 50 % between two steps.

Every row is a process of its own. What counts is its largest resident set (VmHWM) after the model was loaded, less what
it had after the same on a tiny model; on CUDA what torch had allocated there at most. Weights are copied out of the
file first: transformers maps it into memory, and pages of it that nothing reads any more count as resident until the
kernel needs them for something else. `--mapped` leaves them there. `--malloc steady` (default): one arena, and every
block over 64 kB is returned when it is freed, so that what counts is what is alive; `default`: the allocator as it is.

Columns: ratio to the reference; megabytes; what `Workload.memory_bytes` says over what was measured; seconds per step
over those of the reference.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine.client_round import Local, tuned
from fedspine.config import RunConfig
from fedspine.cost import workload_of
from fedspine.data.encode import Encoded
from fedspine.devices.clock import VirtualMeter, device_state
from fedspine.devices.population import load_population
from fedspine.lora.adapters import narrow, start_adapters
from fedspine.model import load_base
from fedspine.pruning.families import describe, head_of
from fedspine.pruning.select import select
from fedspine.stopwatch import Stopwatch
from fedspine.structure import Structure
from fedspine.training import tensors
from fedspine.types import TRAINED, Action, Report, TrainRequest
from fedspine.workbench import Workbench, resident_of

ROWS, LENGTH, RANK = 4, 256, 8
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
COMMON: dict[str, Any] = {"vocab_size": 32_000, "max_position_embeddings": 512, "pad_token_id": 0}
LLAMA = {
    **COMMON,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 2048,
}
TINY = {**COMMON, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
FAMILIES = {"minilm": "bert", "llama": "llama", "llama-lm": "llama"}


@dataclass(frozen=True)
class Case:
    """One row."""

    name: str
    stock: bool = False
    before: float = 0.0
    """Sparsity of the model that the device gets."""
    after: float = 0.0
    """And at the end of the round."""
    own: bool = True
    checkpointing: bool = False


CASES = (
    Case("reference: stock PEFT, unpruned", stock=True),
    Case("0 %"),
    Case("30 %", before=0.3, after=0.3),
    Case("50 %", before=0.5, after=0.5),
    Case("cut inside, 30 to 50 %", before=0.3, after=0.5),
    Case("50 %, the whole base kept (simulation)", before=0.5, after=0.5, own=False),
    Case("reference with gradient checkpointing", stock=True, checkpointing=True),
    Case("0 %, gradient checkpointing", checkpointing=True),
    Case("50 %, gradient checkpointing", before=0.5, after=0.5, checkpointing=True),
)


@dataclass(frozen=True)
class Subject:
    """What is tuned, where, and for how long."""

    model: str
    task: str
    device: str
    mapped: bool
    steps: int


def measure(case: Case, tiny: Subject, subject: Subject) -> dict[str, float]:
    """In the process of one row: peak and estimated bytes, seconds per step."""
    torch.set_num_threads(1)
    play(case, tiny)
    gc.collect()
    before = resident_bytes("VmRSS")
    seconds, estimate = play(case, subject)
    peak = torch.cuda.max_memory_allocated() if subject.device == "cuda" else resident_bytes("VmHWM") - before
    return {"bytes": peak, "estimate": estimate, "seconds": seconds / subject.steps}


def play(case: Case, subject: Subject) -> tuple[float, int]:
    """Load and tune: seconds of the steps, and the bytes that the cost formula expects."""
    config = RunConfig(
        model=subject.model,
        task=subject.task,
        max_length=LENGTH,
        batch_size=ROWS,
        local_iterations=subject.steps,
        prune_interval=subject.steps // 2 if case.after > case.before else subject.steps,
        probe_examples=2 * ROWS,
        fixed_rank=RANK,
        torch_device=subject.device,
        gradient_checkpointing=case.checkpointing,
    )
    model, family = load_base(config, 2, 0)
    if not subject.mapped:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    resident: Any = model.to(subject.device)
    if not case.stock:
        resident = resident_of(model, family, config)
    local, bench = _device(config, case, resident)
    if subject.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    if case.stock:
        return _stock(config, local, bench), local.report.peak_memory_bytes
    watch = Stopwatch()
    reply = tuned(local, bench, watch, case.own)
    if reply.report.outcome != TRAINED:
        raise RuntimeError(reply.report.message)
    wall = watch.seconds()
    return sum(wall[part] for part in ("forward", "backward", "score", "optimiser")), reply.report.peak_memory_bytes


def _device(config: RunConfig, case: Case, resident: Any) -> tuple[Local, Workbench]:
    """A device with random texts for every step, and what its process keeps. Stock: `resident` is the plain model."""
    rng = np.random.default_rng(0)
    rows = ROWS * config.local_iterations
    data = Encoded(
        rng.integers(5, 20_000, rows * LENGTH),
        np.arange(rows + 1, dtype=np.int64) * LENGTH,
        None,
        rng.integers(0, 2, rows),
        np.ones(rows * LENGTH, dtype=np.bool_) if config.task == "causal-lm" else None,
    )
    shape = describe(resident, resident.config.model_type, config.lora_targets) if case.stock else resident.shape
    scores = tuple(
        (rng.random(shape.heads, dtype=np.float32), rng.random(shape.channels, dtype=np.float32))
        for _ in range(shape.layers)
    )
    structure = select(Structure.full(shape), scores, case.before, shape)
    arrays = start_adapters(shape, config.max_rank, rng) | ({} if case.stock else resident.head_arrays())
    sent = narrow(arrays, structure, RANK, shape)
    request = TrainRequest(2, 0, Action(case.after, RANK), structure, sent, scores, config.to_json())
    population = load_population(config.population, config.devices)
    meter = VirtualMeter(device_state(population, config.seed, 0, 2))
    needed = int(workload_of(config, shape).memory_bytes(structure, RANK))
    unused: Any = None
    bench = Workbench(config, unused, data, lambda _: data, lambda: resident, resident, population, 0)
    return Local(request, data, meter, Report(TRAINED, examples=rows, peak_memory_bytes=needed)), bench


def _stock(config: RunConfig, local: Local, bench: Workbench) -> float:
    """Seconds of the plain loop."""
    model: Any = bench.resident
    family, device = model.config.model_type, torch.device(config.torch_device)
    names = [module.name for module in describe(model, family, config.lora_targets).modules]
    settings = LoraConfig(
        r=RANK,
        lora_alpha=RANK * config.lora_scale,
        target_modules=names,
        modules_to_save=list(head_of(model, family)) or None,
    )
    adapted: Any = get_peft_model(model, settings)
    if config.gradient_checkpointing:
        # Without dropout, training mode changes nothing else.
        adapted.train().gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    batches = list(bench.training_batches(local.request.device, local.request.round, config.local_iterations))
    began = time.perf_counter()
    for batch in batches:
        labels = torch.from_numpy(batch.labels).to(device)
        if config.task == "causal-lm":
            loss = adapted(**tensors(batch, device), labels=labels).loss
        else:
            loss = nn.functional.cross_entropy(adapted(**tensors(batch, device)).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def resident_bytes(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def write_model(folder: Path, name: str, sizes: Mapping[str, Any]) -> str:
    """Random weights."""
    kind = AutoModelForCausalLM if name == "llama-lm" else AutoModelForSequenceClassification
    torch.manual_seed(0)
    kind.from_config(AutoConfig.for_model(FAMILIES[name], **sizes)).save_pretrained(folder)
    return str(folder)


def table(tiny: Subject, subject: Subject, malloc: str) -> dict[str, dict[str, float]]:
    """All rows of one model, printed as they come."""
    figures: dict[str, dict[str, float]] = {}
    for case in CASES:
        done = subprocess.run(
            [sys.executable, __file__, "--case", json.dumps([asdict(each) for each in (case, tiny, subject)])],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(STEADY if malloc == "steady" else {})},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        row = figures[case.name] = json.loads(done.stdout.splitlines()[-1])
        first = next(iter(figures.values()))
        row["ratio"] = row["bytes"] / first["bytes"]
        print(
            f"{case.name:40s} {row['ratio']:6.3f} {row['bytes'] / 1e6:7.0f} {row['estimate'] / row['bytes']:9.2f} "
            f"{row['seconds'] / first['seconds']:6.2f}",
            flush=True,
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--malloc", default="steady", choices=["steady", "default"])
    parser.add_argument("--mapped", action="store_true", help="leave the weights in the mapped file")
    parser.add_argument("--steps", type=int, default=2, help="local iterations, an even number")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, tiny, subject = json.loads(options.case)
        print(json.dumps(measure(Case(**case), Subject(**tiny), Subject(**subject))))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            rest = ("causal-lm" if name == "llama-lm" else "classification", options.device, options.mapped)
            tiny = write_model(Path(folder) / f"tiny-{name}", name, TINY)
            model = RunConfig().model if name == "minilm" else write_model(Path(folder) / name, name, LLAMA)
            print(f"{name:40s} {'ratio':>6s} {'MB':>7s} {'estimate':>9s} {'time':>6s}")
            figures[name] = table(Subject(tiny, *rest, 2), Subject(model, *rest, options.steps), options.malloc)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
