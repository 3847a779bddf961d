"""After the last round, the uncut global model teaches the cut one, on the server, on texts without labels.

The averaged adapters on the uncut base are a teacher that costs nothing (distillation as in arXiv 1503.02531: KL
divergence of logits at a temperature). The student is the server's own cut structure with the same adapters. The texts
are rows of the training set that were set aside before it was dealt out. Devices take no part, and the virtual clock
does not move. The adapters were trained under masks, so that the uncut model is not always the better one: where it is
not, there is nothing to learn from it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from fedspine.data.encode import training_batches
from fedspine.federation import ServerState
from fedspine.lora.adapters import kept_features, narrow, widen
from fedspine.randomness import Purpose, generator
from fedspine.structure import ModelShape, Structure
from fedspine.training import LocalOptimizer, predictions
from fedspine.types import Array, Arrays
from fedspine.workbench import Workbench

TEMPERATURE = 2.0
ROWS = 32
"""In a step."""
RATE = 0.3
"""Of the devices' learning rate: the student starts close to what it shall become."""


def distilled(bench: Workbench, state: ServerState) -> ServerState:
    """The state with distilled adapters in full coordinates, always from the averaged ones: to repeat it is harmless.

    Where devices keep what the server's structure has cut, the adapters' rows there stay as they were.
    """
    assert bench.public is not None
    config, shape, resident = bench.config, bench.shape, bench.resident
    rng = generator(config.seed, 0, 0, Purpose.DISTILL)
    batches = list(training_batches(bench.public, ROWS, config.distill_steps, rng, bench.pad_id))
    full = Structure.full(shape)
    resident.mount(full, narrow(state.averaged, full, config.max_rank, shape), merge=True)
    with torch.no_grad():
        taught = [predictions(resident, batch)[0] for batch in batches]
    resident.mount(state.consensus, narrow(state.averaged, state.consensus, config.max_rank, shape))
    optimizer = LocalOptimizer(resident, RATE * config.learning_rate, config.clip_norm)
    for batch, logits in zip(batches, taught, strict=True):
        torch.autograd.backward(divergence(predictions(resident, batch)[0], logits))
        optimizer.step()
    return replace(state, distilled=_placed(resident.arrays(), state.averaged, state.consensus, shape))


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over rows of T^2 KL(teacher || student) of logits [rows, classes] at temperature T."""
    logs = [functional.log_softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher)]
    return TEMPERATURE**2 * functional.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)


def _placed(arrays: Arrays, past: Arrays, structure: Structure, shape: ModelShape) -> dict[str, Array]:
    """A structure's adapters in full coordinates, with past values where it has cut."""
    result = widen(arrays, structure, shape)
    for module in shape.modules:
        name = f"{module.name}.{'B' if module.axis == 'rows' else 'A'}"
        cut = np.ones(len(past[name]) if module.axis == "rows" else past[name].shape[1], dtype=bool)
        cut[kept_features(module, structure)] = False
        index = np.s_[cut] if module.axis == "rows" else np.s_[:, cut]
        result[name][index] = past[name][index]
    return result
