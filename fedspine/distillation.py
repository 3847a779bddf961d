"""After the last round, the uncut global model teaches the cut ones, on the server, on texts without labels.

The averaged adapters on the uncut base are a teacher that costs nothing (distillation as in arXiv 1503.02531: KL
divergence of logits at a temperature). The student has the same adapters, in every step under the structure of another
device, so that they suit all of them. The texts are rows of the training set that were set aside before it was dealt
out. Devices take no part, and the virtual clock does not move. The adapters were trained under masks, so that the uncut
model is not always the better one: where it is not, there is nothing to learn from it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from fedspine.data.encode import training_batches
from fedspine.federation import ServerState
from fedspine.lora.adapters import narrow
from fedspine.lora.group import DeviceGroup
from fedspine.randomness import Purpose, generator
from fedspine.structure import Structure
from fedspine.training import LocalOptimizer, predictions
from fedspine.workbench import Workbench

TEMPERATURE = 2.0
ROWS = 32
"""In a step."""
RATE = 0.6
"""Of the devices' learning rate: the student starts close to what it shall become."""


def distilled(bench: Workbench, state: ServerState) -> ServerState:
    """The state with distilled adapters in full coordinates, always from the averaged ones: to repeat it is harmless.

    Where every structure has cut, the adapters' rows stay as they were.
    """
    assert bench.public is not None
    config, shape, resident = bench.config, bench.shape, bench.resident
    rng = generator(config.seed, 0, 0, Purpose.DISTILL)
    batches = list(training_batches(bench.public, ROWS, config.distill_steps, rng, bench.pad_id))
    full = Structure.full(shape)
    arrays = narrow(state.averaged, full, config.max_rank, shape)
    resident.mount(full, arrays, merge=True)
    with torch.no_grad():
        taught = [predictions(resident, batch)[0] for batch in batches]
    structures = list(
        dict.fromkeys([state.consensus, *(state.structures[device] for device in sorted(state.structures))])
    )
    group = DeviceGroup(resident, [full], [arrays])
    try:
        optimizer = LocalOptimizer(resident, RATE * config.learning_rate, config.clip_norm)
        for batch, logits in zip(batches, taught, strict=True):
            group.cut([structures[rng.integers(len(structures))]])
            torch.autograd.backward(divergence(predictions(resident, batch)[0], logits))
            optimizer.step()
        group.cut([full])
        return replace(state, distilled=group.arrays()[0])
    finally:
        group.close()


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over rows of T^2 KL(teacher || student) of logits [rows, classes] at temperature T."""
    logs = [functional.log_softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher)]
    return TEMPERATURE**2 * functional.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)
