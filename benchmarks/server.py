"""What the server's own work costs: planning a round, and joining the replies.

    .venv/bin/python benchmarks/server.py

Planning: 1,000 sampled devices with 3,000 past rounds of devices, milliseconds per policy. Aggregation: 100 replies of
MiniLM adapters of mixed ranks and structures, seconds per rule, and against the least that any rule has to do, which is
to read every array once. Each figure is the smallest of several runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from fedspine.aggregation import RULES
from fedspine.aggregation.update import Update
from fedspine.config import RunConfig
from fedspine.controller.policy import make_policy, rank_grid
from fedspine.cost import workload_of
from fedspine.lora.adapters import narrow, start_adapters
from fedspine.lora.resident import ResidentModel
from fedspine.model import load_base
from fedspine.structure import ModelShape, Structure
from fedspine.types import TRAINED, Action, Candidate, Pull, Report
from fedspine.workbench import configure_threads

DEVICES, PAST, REPLIES, RUNS = 1_000, 3_000, 100, 3


def main() -> None:
    configure_threads(1)
    config = RunConfig(devices=DEVICES, sampled=DEVICES)
    model, family = load_base(config, 2)
    resident = ResidentModel(model, family, config.lora_targets, config.max_rank, config.lora_scale)
    print(f"planning {DEVICES} devices, {PAST} past rounds of devices")
    for policy in ("fixed", "random", "s-ucb", "time-model", "fedspine"):
        print(f"  {policy:12s} {1e3 * plan_seconds(policy, resident.shape):8.1f} ms")
    replies, state = updates(resident)
    read = smallest(lambda: [array.sum() for update in replies for array in update.arrays.values()])
    print(f"aggregating {REPLIES} replies of ranks 4, 8, 16 at 0 to 50 % sparsity; reading them takes {read:.3f} s")
    for name, rule in RULES.items():
        seconds = smallest(lambda rule=rule: rule(state, replies, resident.shape))  # type: ignore[misc]
        print(f"  {name:12s} {seconds:8.3f} s  {seconds / read:6.1f} x reading")


def plan_seconds(policy: str, shape: ModelShape) -> float:
    config = RunConfig(policy=policy, devices=DEVICES, sampled=DEVICES)
    workload = workload_of(config, shape)
    rng = np.random.default_rng(0)
    ranks = rank_grid(config.min_rank, config.max_rank)
    chosen = make_policy(config, workload)
    pulls = []
    for index in range(PAST):
        action = Action(float(rng.uniform(0, 0.5)), int(rng.choice(ranks)))
        moved = int(workload.adapter_bytes(action.pruning_ratio, action.lora_rank))
        times = rng.uniform(0.5, 5.0, 3)
        report = Report(TRAINED, 10, *map(float, times), download_bytes=moved, upload_bytes=moved)
        flops = workload.planned_flops(action.pruning_ratio, action.lora_rank)
        quality = float(rng.random())
        pulls.append(Pull(1, index % DEVICES, action, 0.0, action.pruning_ratio, report, flops, None, quality, quality))
    lows = rng.uniform(0.0, 0.25, DEVICES)
    candidates = [Candidate(device, float(low), float(low), 0.5, ranks) for device, low in enumerate(lows)]
    return smallest(lambda: chosen.suggest(10, candidates, pulls, (0, 10, 0, 0)))


def updates(resident: ResidentModel) -> tuple[list[Update], dict[str, np.ndarray]]:
    shape = resident.shape
    rng = np.random.default_rng(0)
    state = start_adapters(shape, 16, rng) | resident.head_arrays()
    state = {name: array + rng.normal(0, 0.02, array.shape).astype(np.float32) for name, array in state.items()}
    replies = []
    for index in range(REPLIES):
        keep = 1.0 - 0.5 * index / (REPLIES - 1)
        masks = [(_mask(rng, shape.heads, keep), _mask(rng, shape.channels, keep)) for _ in range(shape.layers)]
        structure = Structure.from_masks(masks)
        arrays = narrow(state, structure, (4, 8, 16)[index % 3], shape)
        arrays = {name: array + rng.normal(0, 0.01, array.shape).astype(np.float32) for name, array in arrays.items()}
        replies.append(Update(float(rng.integers(50, 500)), structure, arrays))
    return replies, state


def _mask(rng: np.random.Generator, count: int, keep: float) -> np.ndarray:
    mask = np.zeros(count, dtype=np.bool_)
    mask[rng.choice(count, max(1, round(keep * count)), replace=False)] = True
    return mask


def smallest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
