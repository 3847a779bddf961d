"""`GridExchange`: requests to devices and their replies, over any Flower `Grid`.

The round loop is ours, because Flower's strategies send one record to every node.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedspine.errors import FederationError, FedSpineError
from fedspine.exchange import LONGEST_REASON, Attendance, implausible
from fedspine.flower import records
from fedspine.flower.client_app import EVALUATE, PROBE, TRAIN, one_line
from fedspine.flower.mail import Mail, always
from fedspine.flower.roster import Roster, content
from fedspine.lora.factors import off_the_wire
from fedspine.types import (
    FAILED,
    OUT_OF_MEMORY,
    EvaluateReply,
    EvaluateRequest,
    Probe,
    ProbeRequest,
    Report,
    TrainReply,
    TrainRequest,
)

T = TypeVar("T")
Measured = TypeVar("Measured", Probe, EvaluateReply)
KILLED = "the process that trained was killed, as the system does when memory runs out"


class GridExchange:
    """Implements `fedspine.exchange.Exchange` over a grid.

    `devices`: how many must have joined before the first request, within `connect_seconds`. `timeout_seconds`,
    `poll_seconds`, `check_alive`: as of `Mail`. `stand_in`: the nodes are `devices` places that any device of a larger
    federation takes in turn, so as many messages are under way.

    `real`: devices come and go. A probe or an evaluation that is not answered is None, and after the first round a
    person's mistake on a device fails that device only; in a simulation both are errors. `least`: of the devices, that
    must have joined; `names`, `nodes`, `directory`: as of `Roster`.
    """

    def __init__(
        self,
        grid: Grid,
        devices: int,
        *,
        timeout_seconds: float | None = None,
        connect_seconds: float = 60.0,
        poll_seconds: float = 1.0,
        check_alive: Callable[[], None] = always,
        stand_in: bool = False,
        real: bool = False,
        least: int | None = None,
        names: Sequence[str] = (),
        nodes: Mapping[str, int] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._devices = devices
        self._stand_in = stand_in
        self._real = real
        self._connect_seconds = connect_seconds
        self._mail = Mail(
            grid,
            timeout_seconds=timeout_seconds,
            poll_seconds=poll_seconds,
            check_alive=check_alive,
            most=devices if stand_in else math.inf,
        )
        self._roster = Roster(
            self._mail,
            devices,
            least=devices if least is None else least,
            connect_seconds=connect_seconds,
            names=names,
            nodes=nodes,
            directory=directory,
            lenient=real,
        )
        self._begun = False

    def attendance(self, needed: int) -> Attendance:
        """Who can be asked, when at least `needed` devices can. Simulated devices always can.

        Errors: `FederationError` when too few are there within `connect_seconds`.
        """
        if not self._real:
            return Attendance()
        deadline = time.monotonic() + self._connect_seconds
        while True:
            busy = self._mail.overdue()
            there = {device for node, device in self._roster.connected().items() if node not in busy}
            if len(there) >= needed:
                discarded = self._roster.devices_of(self._mail.discarded())
                return Attendance(frozenset(range(self._devices)) - there, discarded)
            if time.monotonic() > deadline:
                raise FederationError(
                    f"only {len(there)} devices are there, and a round needs {needed} (sampled x quorum), for "
                    f"{self._connect_seconds:.0f} s now; start the missing SuperNodes and continue with --resume"
                )
            self._mail.check_alive()
            time.sleep(self._mail.poll_seconds)

    def probe(self, requests: Sequence[ProbeRequest]) -> list[Probe | None]:
        """What each device measured, in the order of the requests.

        Errors: `FederationError` when a simulated device fails or does not answer.
        """
        contents = ((request.device, records.pack_probe_request(request)) for request in requests)
        probes: dict[int, Probe | None] = {}
        for index, reply in self._converse(contents, PROBE):
            probes[index] = self._needed(reply, requests[index].device, "the probe", records.unpack_probe)
        return [probes[index] for index in range(len(requests))]

    def train(self, requests: Sequence[TrainRequest], on_reply: Callable[[TrainReply], None]) -> list[TrainReply]:
        """Replies in the order of the requests; `on_reply` sees each when it arrives.

        A device that fails, cannot be reached or is late gives a reply with the outcome `failed`; one whose process was
        killed, `out_of_memory`.
        Errors: the `FedSpineError` of a device, when a person's mistake caused it.
        """
        contents = ((request.device, records.pack_train_request(request)) for request in requests)
        replies: dict[int, TrainReply] = {}
        for index, reply in self._converse(contents, TRAIN):
            replies[index] = self._trained(reply, requests[index])
            on_reply(replies[index])
        self._begun = True
        return [replies[index] for index in range(len(requests))]

    def evaluate(
        self, requests: Sequence[EvaluateRequest], on_reply: Callable[[EvaluateReply], None]
    ) -> list[EvaluateReply | None]:
        """Replies in the order of the requests; `on_reply` sees each when it arrives.

        Errors: `FederationError` when a simulated device fails or does not answer.
        """
        contents = ((request.device, records.pack_evaluate_request(request)) for request in requests)
        replies: dict[int, EvaluateReply | None] = {}
        for index, reply in self._converse(contents, EVALUATE):
            device = requests[index].device
            answer = self._needed(reply, device, "the evaluation", records.unpack_evaluate_reply)
            replies[index] = evaluated = None if answer is None else replace(answer, device=device)
            if evaluated is not None:
                on_reply(evaluated)
        return [replies[index] for index in range(len(requests))]

    def _converse(
        self, contents: Iterable[tuple[int, RecordDict]], message_type: str
    ) -> Iterator[tuple[int, Message | str]]:
        """Send contents to devices; yields (index, reply or why there is none) in order of arrival."""
        nodes = {device: node for node, device in self._roster.connected().items()}
        addressed = (
            (index, nodes.get(index % self._devices if self._stand_in else device), content)
            for index, (device, content) in enumerate(contents)
        )
        yield from self._mail.deliver(addressed, message_type)

    def _trained(self, reply: Message | str, request: TrainRequest) -> TrainReply:
        answer = self._read(reply, records.unpack_train_reply)
        if not isinstance(answer, str):  # in float32 at once: not all of a round in two types
            return replace(answer, device=request.device, arrays=off_the_wire(answer.arrays))
        killed = not isinstance(reply, str) and reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_CRASHED
        report = Report(OUT_OF_MEMORY, message=KILLED) if killed else Report(FAILED, message=answer)
        return TrainReply(request.device, report, request.structure, {}, None)

    def _needed(
        self, reply: Message | str, device: int, what: str, unpack: Callable[[RecordDict], Measured]
    ) -> Measured | None:
        answer = self._read(reply, unpack)
        if not isinstance(answer, str):
            if not (problem := implausible(answer)):
                return answer
            answer = problem
        if self._real:
            return None
        raise FederationError(f"device {device} did not answer {what}: {answer}")

    def _read(self, reply: Message | str, unpack: Callable[[RecordDict], T]) -> T | str:
        """What a device answered, or why there is nothing."""
        answer = self._answer(reply)
        if isinstance(answer, str):
            return answer
        try:
            return unpack(answer)
        except Exception as error:  # whatever a device sends must not end the run
            return f"its answer cannot be read: {one_line(error)}"[:LONGEST_REASON]

    def _answer(self, reply: Message | str) -> RecordDict | str:
        try:
            return content(reply)
        except FedSpineError as error:
            if self._real and self._begun:
                return str(error)
            raise
