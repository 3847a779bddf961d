"""After the last round: every device is cut to the target, and the devices' own models are evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedspine.federation import Federation, ServerState
from fedspine.lora.adapters import narrow
from fedspine.pruning.scoreboard import pruning_scores
from fedspine.pruning.select import select
from fedspine.randomness import Purpose, generator
from fedspine.structure import Structure
from fedspine.types import TRAINED, EvaluateReply, EvaluateRequest, RoundRecord


def prune_everyone(federation: Federation, state: ServerState, records: Sequence[RoundRecord]) -> ServerState:
    """Cut every device that is not there yet to the target: also those that were never sampled."""
    config, shape = federation.config, federation.shape
    if config.target_sparsity == 0 or state.shared_scores is None:
        return state
    target, budget = config.target_sparsity, config.layer_budget
    took_part = Counter(pull.device for record in records for pull in record.pulls if pull.report.outcome == TRAINED)
    uncut = select(Structure.full(shape), state.shared_scores, target, shape, budget)
    structures = dict.fromkeys(range(config.devices), uncut)
    for device, structure in state.structures.items():
        scores = pruning_scores(config.masks, device, state.shared_scores, state.own_scores, took_part[device])
        structures[device] = select(structure, scores or state.shared_scores, target, shape, budget)
    consensus = select(state.consensus, state.shared_scores, target, shape, budget)
    return replace(state, structures=structures, consensus=consensus)


def evaluate_devices(federation: Federation, state: ServerState) -> list[EvaluateReply]:
    """The devices' own cut models with the averaged adapters, at the server's rank; replies by device.

    At most `eval_devices` of them. The evaluation set is the same for all, so devices that keep the same structure are
    evaluated once.
    """
    config, shape = federation.config, federation.shape
    wanted = min(config.eval_devices or config.devices, config.devices)
    rng = generator(config.seed, 0, 0, Purpose.EVALUATE_DEVICES)
    devices = sorted(rng.choice(config.devices, wanted, replace=False).tolist())
    structures = [state.structures.get(device, Structure.full(shape)) for device in devices]
    first = {structure: device for device, structure in zip(reversed(devices), reversed(structures), strict=True)}
    requests = [
        EvaluateRequest(
            state.round, device, structure, narrow(state.final, structure, config.max_rank, shape), config.to_json()
        )
        for structure, device in first.items()
    ]
    done = 0

    def count(_: EvaluateReply) -> None:
        nonlocal done
        done += 1
        federation.observer.evaluating(done, len(requests))

    replies = dict(zip(first, federation.exchange.evaluate(requests, count), strict=True))
    return [replace(replies[structure], device=device) for device, structure in zip(devices, structures, strict=True)]
