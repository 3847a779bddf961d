"""The seam between server and devices: who can be asked, what is asked, and which answers are taken.

A simulated device is always there. A real one may be away, die at work or answer too late; it is then left out of the
round, recorded as failed, and asked again when it is back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedspine.structure import Structure
from fedspine.types import (
    FAILED,
    TRAINED,
    EvaluateReply,
    EvaluateRequest,
    Probe,
    ProbeRequest,
    TrainReply,
    TrainRequest,
)

if TYPE_CHECKING:
    from fedspine.federation import Federation, RoundPlan


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


def train_devices(federation: Federation, plan: RoundPlan) -> list[TrainReply]:
    """Longest local rounds first, so that no worker is left with a long one at the end; replies in device order."""
    requests = {request.device: request for request in plan.requests}
    replies: dict[int, TrainReply] = {}
    began = time.perf_counter()

    def flops(request: TrainRequest) -> float:
        workload, action = federation.workload, request.action
        return workload.share(action) * workload.round_flops(request.structure, action.lora_rank)

    def take(reply: TrainReply) -> None:
        reply = checked(reply, requests[reply.device])
        report = reply.report
        if federation.config.cost == "measured" and report.outcome != TRAINED and not report.seconds:
            # It has told nothing of its time: what the round lost by it.
            reply = replace(reply, report=replace(report, compute_seconds=time.perf_counter() - began))
        replies[reply.device] = reply
        federation.observer.device_done(plan.round, reply.device, reply.report.outcome)

    federation.exchange.train(sorted(plan.requests, key=flops, reverse=True), take)
    return [replies[request.device] for request in plan.requests]


def checked(reply: TrainReply, request: TrainRequest) -> TrainReply:
    """The reply, or a failed one in place of one that must not reach the other devices: NaN, infinity, other names."""
    if reply.report.outcome != TRAINED:
        return reply
    wrong = [name for name, array in reply.arrays.items() if not np.isfinite(array).all()]
    wrong += ["scores"] if reply.scores and not all(np.isfinite(x).all() for pair in reply.scores for x in pair) else []
    if not wrong:
        return reply
    message = f"rejected: NaN or infinity in {wrong[0]}" + (f" and {len(wrong) - 1} more" if wrong[1:] else "")
    return TrainReply(reply.device, replace(reply.report, outcome=FAILED, message=message), request.structure, {}, None)
