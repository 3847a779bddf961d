"""The part of a cell that trains: in a federation, on the user's device, or one after the other.

A federated part is `fedspine.simulate` over the users, each one a device; its averaged adapters and what each device
has kept are where a local part begins, or what is measured. Local steps are those of a device's round.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedspine.checkpoint import load_state
from fedspine.federation import ServerState
from fedspine.lora.adapters import narrow
from fedspine.pruning.importance import MagnitudeScorer
from fedspine.pruning.select import select
from fedspine.simulation import simulate
from fedspine.study.base import start_structure
from fedspine.study.design import Study, compression
from fedspine.study.estimate import CellPlan, device_meter, perturbation_of
from fedspine.study.peft_learners import PeftLearner, is_peft
from fedspine.study.retrieve import Floats
from fedspine.study.workload import step_flops, workload_for
from fedspine.training import Learner, LocalOptimizer, predictions, tune
from fedspine.workbench import Workbench, workbench

Trace = list[dict[str, Any]]
"""A learning curve: what it has cost a device so far, and the value. `energy_joules` is None: nothing measures it."""
Answers = list[list[Floats]]
"""For the last points of a trace: what `Answer` gives for every user's held-out rows."""
Answer = Callable[[Learner, Workbench, int, NDArray[np.int64]], Floats]
"""Of a model, a user and the user's rows of the test set: class shares [rows, classes], or scores [rows]."""


def start_point(plan: CellPlan) -> dict[str, Any]:
    """Of a trace, before any training: the history is searchable by then, if it is to be searched."""
    return {
        "steps": 0,
        "device_seconds": plan.index_seconds,
        "upload_bytes": 0.0,
        "download_bytes": 0.0,
        "peak_memory_bytes": plan.estimate.memory_bytes,
        "energy_joules": None,
        "value": None,
    }


def tuned(
    study: Study, plan: CellPlan, tests: tuple[NDArray[np.int64], ...], work: Path, answer: Answer
) -> tuple[Trace, Answers]:
    """Train as the cell says and let every user's model answer."""
    workbench.cache_clear()  # another cell may have had this configuration, and other data
    trace, state = [start_point(plan)], None
    if plan.federated_steps:
        trace, state = _federated(study, plan, work)
    bench = workbench(plan.config.to_json())
    begin = _peft(plan, bench) if is_peft(plan.cell.levels) else partial(_mounted, plan, bench, state)
    users = [_of_user(study, plan, bench, begin(user), answer, user, rows) for user, rows in enumerate(tests)]
    meter, before = device_meter(study.device, perturbation_of(plan.cell)), trace[-1]
    points = [steps for steps, _ in users[0][1]]
    for steps in points if plan.local_steps else ():
        seconds = meter.compute_seconds(steps * max(flops for flops, _ in users), steps)
        later = {"steps": before["steps"] + steps, "device_seconds": before["device_seconds"] + seconds}
        trace.append({**before, **later, "value": None})
    return trace, [[shares[point][1] for _, shares in users] for point in range(len(points))]


def _federated(study: Study, plan: CellPlan, work: Path) -> tuple[Trace, ServerState]:
    """(learning curve, what the server has in the end). The curve is of the model without retrieval."""
    config = plan.config
    shutil.rmtree(work, ignore_errors=True)
    records = simulate(config, out=work).records
    state = load_state(work, config, workbench(config.to_json()).shape)
    shutil.rmtree(work)
    trace, point = [], start_point(plan)
    of_value = plan.cell.levels["learner"] == "lora" and study.metric == "accuracy"
    for record in records:
        point = {
            **point,
            "steps": record.round * config.local_iterations,
            "device_seconds": plan.index_seconds + record.clock_seconds,
            "upload_bytes": point["upload_bytes"] + record.uploaded_bytes / study.users,
            "download_bytes": point["download_bytes"] + record.downloaded_bytes / study.users,
            "value": record.smoothed_accuracy if of_value else None,
        }
        trace.append(point)
    return trace, state


def _mounted(plan: CellPlan, bench: Workbench, state: ServerState | None, user: int) -> tuple[Learner, float]:
    """(the resident model as it is before the user's local part, FLOPs of a local step)."""
    resident, rank = bench.resident, plan.config.max_rank
    levels = plan.cell.levels
    structure, arrays = start_structure(levels, bench.shape), bench.start
    if state is not None:
        structure, arrays = state.structures.get(user, structure), state.averaged
    resident.mount(structure, narrow(arrays, structure, rank, bench.shape))
    kind, ratio = compression(levels["compression"])
    if kind == "width" and state is None:
        structure = select(structure, MagnitudeScorer(resident).scores(), ratio, bench.shape)
        resident.mount(structure, narrow(arrays, structure, rank, bench.shape))
    return resident, step_flops(plan.cell, workload_for(plan.cell, plan.config, bench.shape), structure.counts())


def _peft(plan: CellPlan, bench: Workbench) -> Callable[[int], tuple[Learner, float]]:
    """The same for a learner that PEFT brings: one model, which every user begins anew with."""
    _, flops = _mounted(plan, bench, None, 0)
    learner = PeftLearner(plan.cell.levels, plan.config, bench.resident)

    def begin(_: int) -> tuple[Learner, float]:
        learner.restart()
        return learner, flops

    return begin


def _of_user(
    study: Study,
    plan: CellPlan,
    bench: Workbench,
    start: tuple[Learner, float],
    answer: Answer,
    user: int,
    rows: NDArray[np.int64],
) -> tuple[float, list[tuple[int, Floats]]]:
    """(FLOPs of a local step, answers to the user's rows after so many steps)."""
    config, (learner, flops) = plan.config, start
    if not plan.local_steps:
        return flops, [(0, answer(learner, bench, user, rows))]
    optimizer = LocalOptimizer(learner, config.learning_rate, config.clip_norm)
    batches = bench.training_batches(user, config.rounds + 1, plan.local_steps)
    done, found = 0, []
    for point in range(1, study.evaluations + 1):
        until = max(1, plan.local_steps * point // study.evaluations)
        tune(learner, optimizer, islice(batches, until - done))
        done = until
        found.append((done, answer(learner, bench, user, rows)))
    return flops, found


def class_shares(learner: Learner, bench: Workbench, _: int, rows: NDArray[np.int64]) -> Floats:
    """Class probabilities [rows, classes] of the mounted model."""
    encoded = replace(bench.test.take(rows), labels=np.arange(len(rows)))
    shares = np.zeros((len(rows), len(bench.data.classes)))
    with torch.inference_mode():
        for batch in bench.evaluation_batches(encoded):
            logits, which = predictions(learner, batch)
            shares[which.numpy()] = logits.double().softmax(-1).numpy()
    return shares
