"""The seam between server and devices: who can be asked, what is asked, and which answers are taken.

A simulated device is always there. A real one may be away, die at work or answer too late; it is then left out of the
round, recorded as failed, and asked again when it is back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedspine.lora.adapters import above, narrow, ranks_of
from fedspine.lora.factors import BOTH, of_sides, trained_sides
from fedspine.structure import ModelShape, Structure
from fedspine.types import (
    FAILED,
    OUT_OF_MEMORY,
    TRAINED,
    Arrays,
    EvaluateReply,
    EvaluateRequest,
    Probe,
    ProbeRequest,
    Report,
    TrainReply,
    TrainRequest,
)

if TYPE_CHECKING:
    from fedspine.config import RunConfig
    from fedspine.federation import Federation, RoundPlan

Shapes = dict[str, tuple[int, ...]]
"""Of arrays, by name."""

LARGEST = 1e15
"""Of all that a device measures: seconds, bytes, losses, norms."""
LONGEST_REASON = 300
"""Characters of why something failed: some would fill a screen."""
MOST_EXAMPLES = 10_000_000
"""Rows of a device. The server never sees them, so it cannot count them."""


@dataclass(frozen=True)
class Attendance:
    """Which devices can be asked."""

    away: frozenset[int] = frozenset()
    """Not connected, or still at work on a request whose deadline has passed."""
    discarded: tuple[int, ...] = ()
    """Devices whose answer has come since, after its deadline; nothing was done with it."""


class Exchange(Protocol):
    """Carries requests to devices. Replies come back in the order of the requests."""

    def attendance(self, needed: int) -> Attendance:
        """Waits while fewer than `needed` devices can be asked. Errors: `FederationError` when they stay away."""

    def probe(self, requests: Sequence[ProbeRequest]) -> Sequence[Probe | None]:
        """None of a real device that does not answer."""

    def train(self, requests: Sequence[TrainRequest], on_reply: Callable[[TrainReply], None]) -> list[TrainReply]: ...

    def evaluate(
        self, requests: Sequence[EvaluateRequest], on_reply: Callable[[EvaluateReply], None]
    ) -> Sequence[EvaluateReply | None]:
        """None of a real device that does not answer."""


def probe_devices(
    federation: Federation, met: Collection[int], round: int, devices: Sequence[int], structures: Sequence[Structure]
) -> list[Probe | None]:
    """A fresh measurement of the devices that have to be probed in this round; None for the others.

    `met`: those that were measured before.
    """
    config = federation.config
    known = met if config.probe == "first" else ()
    wanted = {
        device: ProbeRequest(round, device, structure, config.fixed_rank, config.to_json())
        for device, structure in zip(devices, structures, strict=True)
        if config.uses_probe and device not in known
    }
    done = dict(zip(wanted, federation.exchange.probe(list(wanted.values())), strict=True)) if wanted else {}
    return [done.get(device) for device in devices]


def call_roll(federation: Federation, away: Collection[int]) -> dict[int, Probe]:
    """A measurement of all devices that are there, where the configuration asks for it."""
    config = federation.config
    if not config.uses_roll_call:
        return {}
    full, settings = Structure.full(federation.shape), config.to_json()
    devices = [device for device in range(config.devices) if device not in away]
    probes = federation.exchange.probe(
        [ProbeRequest(1, device, full, config.fixed_rank, settings) for device in devices]
    )
    return {device: probe for device, probe in zip(devices, probes, strict=True) if probe is not None}


def train_devices(federation: Federation, plan: RoundPlan, current: Arrays) -> list[TrainReply]:
    """Longest local rounds first, so that no worker is left with a long one at the end; replies in device order.

    `current`: the global adapters.
    """
    config, shape = federation.config, federation.shape
    sides, current = trained_sides(config.trained_factors, plan.round), of_sides(current, BOTH)
    requests = {request.device: request for request in plan.requests}
    replies: dict[int, TrainReply] = {}
    began = time.perf_counter()

    def flops(request: TrainRequest) -> float:
        workload, action = federation.workload, request.action
        return workload.flops_share(action) * workload.round_flops(request.structure, action.lora_rank)

    @cache  # one for equal devices
    def shapes(structure: Structure, ranks: tuple[int, ...]) -> Shapes:
        return _shapes(of_sides(narrow(current, structure, ranks, shape), sides))

    def take(reply: TrainReply) -> None:
        reply = checked(reply, requests[reply.device], config, shape, shapes)
        report = reply.report
        if config.cost == "measured" and report.outcome != TRAINED and not report.seconds:
            # It has told nothing of its time: what the round lost by it.
            reply = replace(reply, report=replace(report, compute_seconds=time.perf_counter() - began))
        replies[reply.device] = reply
        federation.observer.device_done(plan.round, reply.device, reply.report.outcome)

    federation.exchange.train(sorted(plan.requests, key=flops, reverse=True), take)
    return [replies[request.device] for request in plan.requests]


def checked(
    reply: TrainReply,
    request: TrainRequest,
    config: RunConfig,
    shape: ModelShape,
    shapes: Callable[[Structure, tuple[int, ...]], Shapes],
) -> TrainReply:
    """The reply, or a failed one in place of one that must not reach the other devices, the policy or the clock.

    `shapes`: of the arrays that come back from a device with a structure and these ranks, projection by projection.
    """
    report = reply.report
    if problem := implausible(report):
        report = Report(FAILED, message=_rejected(problem))
    elif report.outcome != TRAINED:
        return reply
    elif problem := _unfit(reply, request, config, shape, shapes):
        report = replace(report, outcome=FAILED, message=_rejected(problem))
    else:
        return reply
    return TrainReply(reply.device, report, request.structure, {}, None)


def implausible(answer: Report | Probe | EvaluateReply) -> str | None:
    """What of an answer no device can have measured."""
    numbers = [(name, value) for name, value in vars(answer).items() if isinstance(value, int | float)]
    if isinstance(answer, Report):
        if answer.outcome not in (TRAINED, OUT_OF_MEMORY, FAILED):
            return f"outcome = {answer.outcome!r}"
        numbers += [*answer.wall.items(), *(("module_salience", value) for value in answer.module_salience)]
    if isinstance(answer, Probe) and not answer.seconds_per_flop:
        return "seconds_per_flop = 0"
    most = {"accuracy": 1.0, "examples": MOST_EXAMPLES}
    wrong = (f"{name} = {value}" for name, value in numbers if not 0 <= value <= most.get(name, LARGEST))
    return next(wrong, None)


def _unfit(
    reply: TrainReply,
    request: TrainRequest,
    config: RunConfig,
    shape: ModelShape,
    shapes: Callable[[Structure, tuple[int, ...]], Shapes],
) -> str | None:
    """Why what a device has trained is no answer to its request."""
    report, structure = reply.report, reply.structure
    asked = tuple(rank or request.action.lora_rank for rank in ranks_of(request.arrays, shape))
    if not report.examples:
        return "examples = 0"
    if not (1 if config.rank_decay < 1.0 else max(asked)) <= report.rank_after <= max(asked):
        return f"rank_after = {report.rank_after}, asked for {max(asked)}"
    if len(report.module_salience) != (len(shape.modules) if config.rank_growth > 1.0 else 0):
        return f"module_salience of {len(report.module_salience)} projections"
    cut = request.scores is not None and structure.within(request.structure) and all(map(all, structure.counts()))
    if not cut and structure != request.structure:
        return "its structure is not one that it was asked for"
    found, wanted = _shapes(reply.arrays), shapes(structure, tuple(min(rank, report.rank_after) for rank in asked))
    wanted = above(wanted, request.action.first_layer(shape.layers), shape)
    wrong = [name for name in (wanted | found) if found.get(name) != wanted.get(name)]
    if wrong:
        return f"{wrong[0]} is {found.get(wrong[0], 'absent')}, asked for {wanted.get(wrong[0], 'none')}"
    scores = [part for pair in reply.scores or () for part in pair]
    if (
        reply.scores is not None
        and [part.shape for part in scores] != [(shape.heads,), (shape.channels,)] * shape.layers
    ):
        return "its scores are not of this model"
    if any(part.dtype != np.float32 for part in (*reply.arrays.values(), *scores)):
        return "its arrays or scores are not of type float32"
    wrong = [name for name, array in reply.arrays.items() if not np.isfinite(array).all()]
    wrong += ["scores"] if not all(np.isfinite(part).all() for part in scores) else []
    return f"NaN or infinity in {wrong[0]}{f' and {len(wrong) - 1} more' if wrong[1:] else ''}" if wrong else None


def _rejected(problem: str) -> str:
    return " ".join(f"rejected: {problem}".split())[:LONGEST_REASON]


def _shapes(arrays: Arrays) -> Shapes:
    return {name: array.shape for name, array in arrays.items()}
