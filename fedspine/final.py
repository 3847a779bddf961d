"""After the last round: every device is cut to the target, and the devices' own models are evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedspine.aggregation.personal import own_part
from fedspine.config import RunConfig
from fedspine.errors import FederationError
from fedspine.federation import Federation, ServerState
from fedspine.lora.adapters import narrow
from fedspine.lora.factors import LOCAL_B, sent
from fedspine.pruning.scoreboard import pruning_scores
from fedspine.pruning.select import recut
from fedspine.randomness import Purpose, generator
from fedspine.structure import ModelShape, Structure
from fedspine.types import TRAINED, Arrays, EvaluateReply, EvaluateRequest, RoundRecord


def prune_everyone(federation: Federation, state: ServerState, records: Sequence[RoundRecord]) -> ServerState:
    """Cut every device that is not there yet to the target: also those that were never sampled."""
    config, shape = federation.config, federation.shape
    if config.target_sparsity == 0 or state.shared_scores is None:
        return state
    target = config.target_sparsity
    took_part = Counter(pull.device for record in records for pull in record.pulls if pull.report.outcome == TRAINED)
    uncut = recut(Structure.full(shape), state.shared_scores, target, shape, config)
    structures = dict.fromkeys(range(config.devices), uncut)
    for device, structure in state.structures.items():
        scores = pruning_scores(config.masks, device, state.shared_scores, state.own_scores, took_part[device])
        structures[device] = recut(structure, scores or state.shared_scores, target, shape, config)
    consensus = recut(state.consensus, state.shared_scores, target, shape, config)
    return replace(state, structures=structures, consensus=consensus)


def device_arrays(
    config: RunConfig, state: ServerState, device: int, structure: Structure, shape: ModelShape
) -> Arrays:
    """What a device ends with (narrow, at the server's rank): the averaged adapters and head.

    Where B and head are a device's own, these with the last A of all; what it has not got is missing.
    """
    if config.trained_factors != LOCAL_B:
        return narrow(state.final, structure, config.max_rank, shape)
    common = sent(narrow(state.arrays, structure, config.max_rank, shape), config)
    return {**common, **own_part(state.local, device, state.arrays, structure, config.max_rank, shape)}


def evaluate_devices(federation: Federation, state: ServerState) -> list[EvaluateReply]:
    """The devices' own cut models as they end, see `device_arrays`; replies by device.

    At most `eval_devices` of them. The evaluation set is the same for all, so devices that keep the same structure, and
    have nothing else of their own, are evaluated once, by the first of them that is there. What is not answered is left
    out.

    Errors: `FederationError` when none answers.
    """
    config, shape = federation.config, federation.shape
    wanted = min(config.eval_devices or config.devices, config.devices)
    rng = generator(config.seed, 0, 0, Purpose.EVALUATE_DEVICES)
    devices = sorted(rng.choice(config.devices, wanted, replace=False).tolist())
    whole = Structure.full(shape)
    models = [(state.structures.get(one, whole), one if one in state.local else None) for one in devices]
    away = federation.exchange.attendance(1).away
    by_presence = sorted(zip(devices, models, strict=True), key=lambda pair: (pair[0] in away, pair[0]), reverse=True)
    first = {model: device for device, model in by_presence}
    requests = [
        EvaluateRequest(
            state.round, device, structure, device_arrays(config, state, device, structure, shape), config.to_json()
        )
        for (structure, _), device in first.items()
    ]
    done = 0

    def count(_: EvaluateReply) -> None:
        nonlocal done
        done += 1
        federation.observer.evaluating(done, len(requests))

    replies = dict(zip(first, federation.exchange.evaluate(requests, count), strict=True))
    answers = [
        replace(reply, device=device)
        for device, model in zip(devices, models, strict=True)
        if (reply := replies[model]) is not None
    ]
    if not answers:
        raise FederationError(
            f"all {config.rounds} rounds are done, but no device answered the evaluation; continue with --resume when "
            "devices are there"
        )
    return answers
