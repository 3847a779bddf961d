"""Peak memory of one device's local round, against stock PEFT LoRA on the unpruned model.

    .venv/bin/python benchmarks/memory.py [--models minilm llama] [--device cuda] [--malloc default] [--out FILE.json]

MiniLM-L6 and a random Llama-shaped model of 110 M parameters, two classes, batches of 4 texts of 256 tokens, LoRA of
rank 8 on q, v, o, up and down, float32, one thread. Every row is a process of its own that loads the model from its
safetensors file. The reference is `get_peft_model`, AdamW and a plain loop, with dropout off. The others are the round
of a real device (`client_round.tuned`): structure and adapters mounted, probe batch before and after, importance
(Fisher) in every step, clipping. "cut inside" starts at 30 % and cuts to 50 % between two iterations.

Memory is the process's largest resident set (VmHWM) less what it had after its imports and one step of a tiny layer; on
CUDA it is what torch had allocated there at most. `--malloc steady` (default): one arena, and every block over 64 kB is
returned when it is freed, so that what counts is what is alive; `default`: the allocator as it is.

Columns: ratio to the reference; megabytes; what `Workload.memory_bytes` says over what was measured; seconds per step
over those of the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig

from fedspine.client_round import Local, Workbench, batches_of, tuned
from fedspine.config import RunConfig
from fedspine.cost import workload_of
from fedspine.data.encode import Encoded
from fedspine.devices.clock import VirtualMeter, device_state
from fedspine.devices.population import load_population
from fedspine.lora.adapters import narrow, start_adapters
from fedspine.lora.resident import ResidentModel
from fedspine.model import load_model
from fedspine.pruning.families import describe, family_of
from fedspine.pruning.select import select
from fedspine.stopwatch import Stopwatch
from fedspine.structure import Structure
from fedspine.training import tensors
from fedspine.types import TRAINED, Action, Report, TrainRequest

ROWS, LENGTH, STEPS, RANK = 4, 256, 4, 8
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LLAMA: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


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


def measure(case: Case, model: str, device: str) -> dict[str, float]:
    """In the process of one row: peak and estimated bytes, seconds per step."""
    torch.set_num_threads(1)
    config = RunConfig(
        model=model,
        max_length=LENGTH,
        batch_size=ROWS,
        local_iterations=STEPS,
        prune_interval=STEPS // 2 if case.after > case.before else STEPS,
        probe_examples=2 * ROWS,
        fixed_rank=RANK,
        torch_device=device,
        gradient_checkpointing=case.checkpointing,
    )
    _warm_up()
    before = _resident("VmRSS")
    local, bench = _device(config, case)
    if case.stock:
        seconds = _stock(config, local, bench)
    else:
        watch = Stopwatch()
        reply = tuned(local, bench, watch, case.own)
        if reply.report.outcome != TRAINED:
            raise RuntimeError(reply.report.message)
        wall = watch.seconds()
        seconds = sum(wall[part] for part in ("forward", "backward", "score", "optimiser"))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM") - before
    return {"bytes": peak, "estimate": local.report.peak_memory_bytes, "seconds": seconds / STEPS}


def _device(config: RunConfig, case: Case) -> tuple[Local, Workbench]:
    """A device that has 4 steps of random texts, and what its process keeps; stock: without a resident model."""
    model, family = load_model(config, 2, 0)
    if case.stock:
        resident: Any = model
        shape = describe(model, family, config.lora_targets)
    else:
        resident = ResidentModel(
            model,
            family,
            config.lora_targets,
            config.max_rank,
            config.lora_scale,
            device=config.torch_device,
            checkpointing=config.gradient_checkpointing,
        )
        shape = resident.shape
    rng = np.random.default_rng(0)
    rows = ROWS * STEPS
    data = Encoded(
        rng.integers(5, 20_000, rows * LENGTH),
        np.arange(rows + 1, dtype=np.int64) * LENGTH,
        None,
        rng.integers(0, 2, rows),
    )
    population = load_population(config.population, config.devices)
    unused: Any = None
    bench = Workbench(config, unused, data, lambda _: data, resident, population, 0)
    scores = tuple(
        (rng.random(shape.heads, dtype=np.float32), rng.random(shape.channels, dtype=np.float32))
        for _ in range(shape.layers)
    )
    structure = select(Structure.full(shape), scores, case.before, shape)
    arrays = {} if case.stock else start_adapters(shape, config.max_rank, rng) | resident.head_arrays()
    sent = {} if case.stock else narrow(arrays, structure, RANK, shape)
    request = TrainRequest(2, 0, Action(case.after, RANK), structure, sent, scores, config.to_json())
    meter = VirtualMeter(device_state(population, config.seed, 0, 2))
    needed = int(workload_of(config, shape).memory_bytes(structure, RANK))
    return Local(request, data, meter, Report(TRAINED, examples=rows, peak_memory_bytes=needed)), bench


def _stock(config: RunConfig, local: Local, bench: Workbench) -> float:
    """Seconds of the plain loop."""
    model: Any = bench.resident
    family = model.config.model_type
    shape = describe(model, family, config.lora_targets)
    adapted: Any = get_peft_model(
        model.to(config.torch_device),
        LoraConfig(
            r=RANK,
            lora_alpha=RANK * config.lora_scale,
            target_modules=[module.name for module in shape.modules],
            modules_to_save=list(family_of(family).head),
        ),
    )
    if config.gradient_checkpointing:
        # Without dropout, training mode changes nothing else.
        adapted.train().gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    batches = list(batches_of(local, bench))
    began = time.perf_counter()
    for batch in batches:
        logits = adapted(**tensors(batch, torch.device(config.torch_device))).logits
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels).to(config.torch_device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def _warm_up() -> None:
    """Load what torch loads at its first step."""
    layer = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    nn.functional.cross_entropy(layer(torch.ones(64, 64)), torch.zeros(64, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the start."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def write_llama(folder: Path) -> str:
    """Random weights."""
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(LlamaConfig(**LLAMA)).save_pretrained(folder)
    return str(folder)


def table(model: str, name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All rows of one model, each in its process, printed as they come."""
    figures: dict[str, dict[str, float]] = {}
    print(f"{name}\n{'':40s} {'ratio':>6s} {'MB':>7s} {'estimate':>9s} {'time':>6s}")
    for case in CASES:
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--case",
                json.dumps(asdict(case)),
                "--model",
                model,
                "--device",
                options.device,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(STEADY if options.malloc == "steady" else {})},
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
    parser.add_argument("--models", nargs="+", default=["minilm", "llama"], choices=["minilm", "llama"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--malloc", default="steady", choices=["steady", "default"])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)), options.model, options.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        sources = {"minilm": lambda: RunConfig().model, "llama": lambda: write_llama(Path(folder) / "llama")}
        figures = {name: table(sources[name](), name, options) for name in options.models}
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
