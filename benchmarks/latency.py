"""Latency of the embedded MiniLM cut to half of its prunable parameters, against the dense one.

    .venv/bin/python -m benchmarks.latency [--batch 1 16] [--repeats 200] [--kept 6x768 6x761 ...] [--profile]

Stock transformers models with sliced weights, the adapters folded in: what an exported model runs. All are timed in
strict alternation, on random tokens without padding. The bar: at most 0.57 of the dense time in float32, by minima.
Other numbers of kept heads and channels per layer (`--kept HEADSxCHANNELS`) show whether rounding them would gain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.local import cut_model
from fedspine.benchmark import alternate
from fedspine.config import RunConfig
from fedspine.model import load_base
from fedspine.pruning.families import describe, projections
from fedspine.pruning.select import select
from fedspine.structure import ModelShape, Structure


def random_structure(shape: ModelShape, ratio: float, rng: np.random.Generator) -> Structure:
    """What `select` keeps by random scores: the numbers, on which the time depends, are those of any scores."""
    scores = tuple(
        (rng.random(shape.heads, dtype=np.float32), rng.random(shape.channels, dtype=np.float32))
        for _ in range(shape.layers)
    )
    return select(Structure.full(shape), scores, ratio, shape)


def of_counts(shape: ModelShape, heads: int, channels: int, rng: np.random.Generator) -> Structure:
    """As many in every layer, drawn."""
    return Structure.from_masks(
        [
            (
                np.isin(np.arange(shape.heads), rng.choice(shape.heads, heads, replace=False)),
                np.isin(np.arange(shape.channels), rng.choice(shape.channels, channels, replace=False)),
            )
            for _ in range(shape.layers)
        ]
    )


def forward(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    mask = torch.ones_like(tokens)
    return lambda: model(input_ids=tokens, attention_mask=mask)


def prunable_bytes(model: nn.Module, family: str) -> int:
    """Of the weights that cutting touches, without biases."""
    names = [module.name for module in projections(model, family)]
    return sum(model.get_submodule(name).weight.nbytes for name in names)  # type: ignore[union-attr, misc]


def where_time_goes(calls: dict[str, Callable[[], object]], runs: int = 20) -> None:
    """Milliseconds of a forward pass by operator, largest first."""
    for name, call in calls.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(runs):
                call()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        print(f"  {name}: {total / runs / 1e3:.2f} ms under the profiler")
        for event in events[:12]:
            print(
                f"    {event.key:45s} {event.self_cpu_time_total / runs / 1e3:8.3f} ms  {event.count // runs:4d} calls"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--kept", nargs="*", default=[], metavar="HEADSxCHANNELS", help="further models")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--processor-time", action="store_true", help="instead of wall time: less noise where others compute too"
    )
    parser.add_argument("--profile", action="store_true", help="also show the operators")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    dense, family = load_base(RunConfig(), 2)
    shape = describe(dense, family, RunConfig().lora_targets)
    rng = np.random.default_rng(0)
    structures = [random_structure(shape, options.sparsity, rng)]
    structures += [of_counts(shape, *map(int, kept.split("x")), rng) for kept in options.kept]
    models = {"dense": dense}
    for structure in structures:
        heads, channels = structure.counts()[0]
        models[f"{heads}x{channels}"] = cut_model(dense, family, structure)
    for name, model in models.items():
        model.to(getattr(torch, options.dtype))
        ratio = sum(p.numel() for p in model.parameters()) / shape.total_parameters
        print(
            f"{name:10s} prunable bytes {prunable_bytes(model, family) / prunable_bytes(dense, family):.3f}, "
            f"parameters {ratio:.3f} of dense"
        )
    for batch in options.batch:
        tokens = torch.from_numpy(rng.integers(1, 30_000, (batch, options.length)))
        calls = {name: forward(model, tokens) for name, model in models.items()}
        with torch.inference_mode():
            clock = time.process_time if options.processor_time else time.perf_counter
            rows = alternate(list(calls.values()), options.repeats, lambda _: None, clock=clock)
            for name, seconds in zip(calls, rows, strict=True):
                print(
                    f"batch {batch:3d} x {options.length}  {name:10s} minimum {1e3 * min(seconds):8.3f} ms "
                    f"({min(seconds) / min(rows[0]):.3f})  median {1e3 * statistics.median(seconds):8.3f} ms "
                    f"({statistics.median(seconds) / statistics.median(rows[0]):.3f})"
                )
            if options.profile:
                where_time_goes(calls)


if __name__ == "__main__":
    main()
