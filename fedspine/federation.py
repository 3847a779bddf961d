"""The loop: plan a round, exchange it with the devices, finish it. Source: FedSpine (arXiv 2501.02438), its workflow.

1. `plan_round` samples devices, asks the policy for each one's (pruning ratio, rank), cuts its structure to the
   round's first step and narrows the global adapters to it.
2. The exchange carries the requests to the devices and their replies back.
3. `finish_round` aggregates in device order, merges importance, rewards the policy's choices and advances the clock.

Nothing here knows torch, Flower or the simulator: the exchange (exchange.py), the policy and the evaluation are handed
in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from fedspine.aggregation import RULES
from fedspine.aggregation.fold import folded, missed_ranks
from fedspine.aggregation.layers import by_layers
from fedspine.aggregation.personal import kept_by_devices, own_part
from fedspine.aggregation.product import average
from fedspine.aggregation.update import Update
from fedspine.config import RunConfig
from fedspine.controller.cohort import Absent, Fleet, choose_devices, gather
from fedspine.controller.policy import Policy, rank_grid
from fedspine.controller.rank_budget import allotted, awakened, for_rank
from fedspine.controller.schedule import allowed_range, check_quorum, floor_ratio, quorum
from fedspine.cost import Workload
from fedspine.exchange import Attendance, Exchange, call_roll, probe_devices, train_devices
from fedspine.late import AwaitedReply, close_round
from fedspine.lora.adapters import narrow
from fedspine.lora.factors import completed, restored, sent, trained_sides
from fedspine.pruning.scoreboard import pruning_scores, update_own, update_shared
from fedspine.pruning.select import recut
from fedspine.randomness import Purpose
from fedspine.report.observer import Observer
from fedspine.round_record import awaited, round_record
from fedspine.stopwatch import Stopwatch
from fedspine.structure import ModelShape, Structure
from fedspine.types import (
    TRAINED,
    Action,
    Arrays,
    Candidate,
    Probe,
    RoundRecord,
    Scores,
    TrainReply,
    TrainRequest,
)


@dataclass(frozen=True)
class Evaluation:
    """Of one model on the evaluation set."""

    accuracy: float
    loss: float
    predicted_share: float
    """Share of the examples that went to the most predicted class."""


@dataclass(frozen=True)
class ServerState:
    """All that the server keeps between rounds, besides the records. Saved after every round."""

    round: int
    """Rounds finished."""
    arrays: Arrays
    """Global adapters in full coordinates at the largest rank, and the head."""
    averaged: Arrays
    """Moving average of the global adapters over rounds, in product space."""
    consensus: Structure
    """The server's own structure, at the sparsity floor: the global model that is evaluated."""
    structures: dict[int, Structure] = field(default_factory=dict)
    """By device; a device that was never cut is absent."""
    shared_scores: Scores | None = None
    own_scores: dict[int, Scores] = field(default_factory=dict)
    local: dict[int, Arrays] = field(default_factory=dict)
    """By device, what it keeps to itself (`aggregation/personal.py`): held for it, as this is a simulation."""
    pending: tuple[AwaitedReply, ...] = ()
    """Late replies of earlier rounds; their devices are busy."""
    distilled: Arrays | None = None
    """After the last round, where `distill_steps` asks for it: the averaged adapters, taught by the uncut model."""

    @property
    def final(self) -> Arrays:
        """What devices get to keep."""
        return self.averaged if self.distilled is None else self.distilled


@dataclass(frozen=True)
class Federation:
    """What a run is made of."""

    config: RunConfig
    shape: ModelShape
    workload: Workload
    policy: Policy
    exchange: Exchange
    evaluate: Callable[[Structure, Arrays], Evaluation]
    """Accuracy of the model cut to a structure, with adapters in full coordinates."""
    observer: Observer
    absent: Absent


@dataclass(frozen=True)
class RoundPlan:
    """One round before it is sent."""

    round: int
    floor: float
    requests: tuple[TrainRequest, ...]
    ratios_before: tuple[float, ...]
    probes: tuple[Probe | None, ...]
    roll_call: Mapping[int, Probe]
    """By device, before the first round."""
    attendance: Attendance
    waited_seconds: float
    """Until enough devices could take part."""


def run_rounds(
    federation: Federation,
    state: ServerState,
    records: Sequence[RoundRecord],
    save: Callable[[ServerState, RoundRecord], None],
) -> tuple[ServerState, tuple[RoundRecord, ...]]:
    """Run what is left of the federation; `save` is called after every round, before the next begins."""
    history = list(records)
    for round in range(state.round + 1, federation.config.rounds + 1):
        watch = Stopwatch()
        with watch.part("plan"):
            plan = plan_round(federation, state, history, round)
        federation.observer.round_started(round, [request.device for request in plan.requests])
        with watch.part("exchange"):
            replies = train_devices(federation, plan, state.arrays)
        with watch.part("aggregate"):
            state, record = finish_round(federation, state, history, plan, replies)
        del plan, replies  # the adapters of all devices, twice: not beside those of the next round
        with watch.part("evaluate"):
            record = evaluate_round(federation, state, record)
        record = replace(record, wall=watch.seconds())
        save(state, record)
        history.append(record)
        federation.observer.round_done(record)
    return state, tuple(history)


def plan_round(federation: Federation, state: ServerState, records: Sequence[RoundRecord], round: int) -> RoundPlan:
    """Sample devices and decide what each one does. The same state and records give the same plan."""
    config, shape = federation.config, federation.shape
    pulls = [pull for record in records for pull in record.pulls]
    there = federation.exchange.attendance(quorum(config, config.sampled))
    called = records[0].roll_call if records else call_roll(federation, there.away)
    began = records[-1].clock_seconds if records else 0.0
    pending = {each.pull.device for each in state.pending}
    busy, waited = gather(config, began, pending | there.away, federation.absent)
    devices = choose_devices(
        config, round, federation.workload, lambda: Fleet.of(config.devices, pulls).with_roll_call(called), busy
    )
    structures = [state.structures.get(device, Structure.full(shape)) for device in devices]
    before = [structure.sparsity(shape) for structure in structures]
    probes = probe_devices(federation, {*called, *(pull.device for pull in pulls)}, round, devices, structures)
    ranks = rank_grid(config.min_rank, config.max_rank)
    took_part = Counter(pull.device for pull in pulls if pull.report.outcome == TRAINED)
    candidates = []
    for device, ratio, probe in zip(devices, before, probes, strict=True):
        low, high = allowed_range(config, round, ratio) if state.shared_scores else (ratio, ratio)
        if not took_part[device]:
            probe = probe or called.get(device)
        candidates.append(Candidate(device, ratio, low, high, ranks, probe))
    key = (config.seed, round, 0, int(Purpose.POLICY))
    actions = federation.policy.suggest(round, candidates, pulls, key)
    grows = config.rank_growth > 1.0
    grown = allotted(config, records, shape) if grows else ()
    arrays = awakened(state.arrays, config, round, shape) if grows else state.arrays

    @cache  # one for equal devices
    def adapters(structure: Structure, rank: int) -> Arrays:
        return sent(narrow(arrays, structure, for_rank(grown, rank, config) if grows else rank, shape), config)

    missed = missed_ranks(config.fold, records, devices)
    requests = tuple(
        _request(federation, state, round, device, action, structure, took_part[device], adapters, behind)
        for device, action, structure, behind in zip(devices, actions, structures, missed, strict=True)
    )
    floor, first = floor_ratio(config, round), {} if records else called
    return RoundPlan(round, floor, requests, tuple(before), tuple(probes), first, there, waited)


def finish_round(
    federation: Federation,
    state: ServerState,
    records: Sequence[RoundRecord],
    plan: RoundPlan,
    replies: Sequence[TrainReply],
) -> tuple[ServerState, RoundRecord]:
    """Aggregate, merge importance, reward, advance the clock.

    Errors: `FederationError` when fewer devices than the quorum trained.
    """
    config, shape = federation.config, federation.shape
    check_quorum(config, plan.round, len(plan.requests), [reply.report for reply in replies])
    asked = awaited(federation.workload, plan, replies)
    closing = close_round(config.close_at, asked, state.pending)
    worth = [(each, each.reply, each.discount(plan.round, config.max_staleness)) for each in closing.arrived]
    joined = [
        (reply, discount, each.pull.action.first_layer(shape.layers))
        for each, reply, discount in worth
        if discount > 0 and reply.report.outcome == TRAINED
    ]
    updates = [
        Update(
            reply.report.examples * discount,
            reply.structure,
            completed(reply.arrays, state.arrays, reply.structure, shape),
            first,
        )
        for reply, discount, first in joined
    ]
    aggregated = by_layers(RULES[config.aggregation], state.arrays, updates, shape)
    averages = restored(aggregated, state.arrays, trained_sides(config.trained_factors, plan.round))
    arrays = folded(config.fold, state.arrays, averages, updates, shape)
    decay = min(config.average_decay, (1 + state.round) / (10 + state.round))  # young averages forget the start faster
    averaged = average(state.averaged, arrays, decay, shape) if state.round else arrays
    devices = [reply.device for reply, *_ in joined]
    scored = [
        (reply.device, reply.structure.above(first), reply.scores)
        for reply, _, first in joined
        if reply.scores is not None
    ]
    shared = update_shared(state.shared_scores, [(structure, scores) for _, structure, scores in scored])
    own = dict(state.own_scores)
    if config.masks != "shared":
        own |= {device: update_own(own.get(device), scores) for device, _, scores in scored}
    consensus = state.consensus
    if shared is not None and plan.floor > 0:
        consensus = recut(consensus, shared, plan.floor, shape, config)
    new_state = ServerState(
        round=plan.round,
        arrays=arrays,
        averaged=averaged,
        consensus=consensus,
        structures=state.structures
        | {reply.device: reply.structure for reply in replies if reply.report.outcome == TRAINED},
        shared_scores=shared,
        own_scores=own,
        local=state.local | kept_by_devices(config.trained_factors, state.arrays, devices, updates, shape),
        pending=closing.late,
    )
    return new_state, round_record(config, records, plan, asked, closing)


def evaluate_round(federation: Federation, state: ServerState, record: RoundRecord) -> RoundRecord:
    """Add the accuracy of the global model in the first round and in every `eval_every`-th, counted from the last."""
    config = federation.config
    if record.round == 1 or (config.rounds - record.round) % config.eval_every == 0:
        now = federation.evaluate(state.consensus, state.arrays)
        same = state.averaged is state.arrays  # in the first round
        smooth = now if same else federation.evaluate(state.consensus, state.averaged)
        record = replace(
            record,
            accuracy=now.accuracy,
            loss=now.loss,
            predicted_share=now.predicted_share,
            smoothed_accuracy=smooth.accuracy,
        )
    return record


def _request(
    federation: Federation,
    state: ServerState,
    round: int,
    device: int,
    action: Action,
    structure: Structure,
    participations: int,
    adapters: Callable[[Structure, int], Arrays],
    missed_rank: int,
) -> TrainRequest:
    config, shape = federation.config, federation.shape
    cuts = config.cuts_in(action.steps(config.local_iterations))
    scores = pruning_scores(config.masks, device, state.shared_scores, state.own_scores, participations)
    if scores is not None:
        before = structure.sparsity(shape)
        first = before + (action.pruning_ratio - before) / cuts
        structure = recut(structure, scores, first, shape, config)
    rank = action.lora_rank
    own = own_part(state.local, device, state.arrays, structure, rank, shape)
    return TrainRequest(
        round=round,
        device=device,
        action=action,
        structure=structure,
        arrays={**adapters(structure, rank), **own},
        scores=scores if cuts > 1 else None,
        settings=config.to_json(),
        missed_rank=missed_rank,
    )
