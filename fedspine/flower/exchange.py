"""`GridExchange`: requests to devices and their replies, over any Flower `Grid`.

The round loop is ours, because Flower's strategies send one record to every node. Node ids are random in every run, so
a device is known by the number or the name that its node answers to a query. Names are numbered in their order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedspine.errors import FederationError
from fedspine.flower import records
from fedspine.flower.client_app import EVALUATE, IDENTIFY, PROBE, TRAIN
from fedspine.types import (
    FAILED,
    EvaluateReply,
    EvaluateRequest,
    Probe,
    ProbeRequest,
    Report,
    TrainReply,
    TrainRequest,
)

FIRST_POLL_SECONDS = 0.005
POLL_GROWTH = 1.5
LONGEST_REASON = 300
"""Characters of an error that Flower or Ray reports: theirs fill a screen."""


def _always() -> None:
    pass


class GridExchange:
    """Implements `fedspine.federation.Exchange` over a grid.

    `devices`: how many must have joined before the first request, within `connect_seconds`. `timeout_seconds`: how
    long to wait for the replies to one call; None waits without bound. `poll_seconds`: longest pause between two looks
    for replies. `check_alive` is called in every pause and raises when no reply can come any more. `stand_in`: the
    nodes are `devices` places that any device of a larger federation takes in turn, so as many messages are under way.
    """

    def __init__(
        self,
        grid: Grid,
        devices: int,
        *,
        timeout_seconds: float | None = None,
        connect_seconds: float = 60.0,
        poll_seconds: float = 1.0,
        check_alive: Callable[[], None] = _always,
        stand_in: bool = False,
    ) -> None:
        self._grid = grid
        self._devices = devices
        self._timeout_seconds = timeout_seconds
        self._connect_seconds = connect_seconds
        self._poll_seconds = poll_seconds
        self._check_alive = check_alive
        self._stand_in = stand_in
        self._identities: dict[int, int | str] = {}
        self._numbers: dict[str, int] = {}

    def probe(self, requests: Sequence[ProbeRequest]) -> list[Probe]:
        """What each device measured, in the order of the requests.

        Errors: `FederationError` when a device fails or does not answer.
        """
        contents = ((request.device, records.pack_probe_request(request)) for request in requests)
        probes: dict[int, Probe] = {}
        for index, reply in self._converse(contents, PROBE):
            probes[index] = records.unpack_probe(_needed(reply, requests[index].device, "the probe"))
        return [probes[index] for index in range(len(requests))]

    def train(self, requests: Sequence[TrainRequest], on_reply: Callable[[TrainReply], None]) -> list[TrainReply]:
        """Replies in the order of the requests; `on_reply` sees each when it arrives.

        A device that fails, cannot be reached or is late gives a reply with the outcome `failed`.
        Errors: the `FedSpineError` of a device, when a person's mistake caused it.
        """
        contents = ((request.device, records.pack_train_request(request)) for request in requests)
        replies: dict[int, TrainReply] = {}
        for index, reply in self._converse(contents, TRAIN):
            answer = _content(reply)
            request = requests[index]
            if isinstance(answer, str):
                report = Report(FAILED, message=answer)
                replies[index] = TrainReply(request.device, report, request.structure, {}, None)
            else:
                replies[index] = records.unpack_train_reply(answer)
            on_reply(replies[index])
        return [replies[index] for index in range(len(requests))]

    def evaluate(
        self, requests: Sequence[EvaluateRequest], on_reply: Callable[[EvaluateReply], None]
    ) -> list[EvaluateReply]:
        """Replies in the order of the requests; `on_reply` sees each when it arrives.

        Errors: `FederationError` when a device fails or does not answer.
        """
        contents = ((request.device, records.pack_evaluate_request(request)) for request in requests)
        replies: dict[int, EvaluateReply] = {}
        for index, reply in self._converse(contents, EVALUATE):
            content = _needed(reply, requests[index].device, "the evaluation")
            replies[index] = records.unpack_evaluate_reply(content)
            on_reply(replies[index])
        return [replies[index] for index in range(len(requests))]

    def _converse(
        self, contents: Iterable[tuple[int, RecordDict]], message_type: str
    ) -> Iterator[tuple[int, Message | str]]:
        """Send contents to devices; yields (index, reply or why there is none) in order of arrival."""
        nodes = {device: node for node, device in self._connected().items()}
        addressed = (
            (index, nodes.get(index % self._devices if self._stand_in else device), content)
            for index, (device, content) in enumerate(contents)
        )
        yield from self._deliver(addressed, message_type)

    def _connected(self) -> dict[int, int]:
        """Device by node id, of the nodes that are there now. The first call waits for all devices."""
        present = set(self._grid.get_node_ids())
        if not self._identities:
            present = self._await_nodes(present)
        strangers = sorted(present - self._identities.keys())
        contents = ((index, node, RecordDict()) for index, node in enumerate(strangers))
        reason = ""
        for index, reply in self._deliver(contents, IDENTIFY):
            answer = _content(reply)
            if isinstance(answer, str):
                reason = answer
            else:
                self._identities[strangers[index]] = records.unpack_identity(answer)
        if not self._identities:
            raise FederationError(f"no device could say which one it is: {reason}")
        here = {node: identity for node, identity in self._identities.items() if node in present}
        names = sorted(identity for identity in here.values() if isinstance(identity, str))
        if names and not self._numbers:
            if reason:
                raise FederationError(f"a device could not say which one it is: {reason}")
            self._numbers = {name: number for number, name in enumerate(names)}
        _check_distinct(here.values(), self._devices, self._numbers)
        return {node: _number(identity, self._numbers) for node, identity in here.items()}

    def _await_nodes(self, present: set[int]) -> set[int]:
        deadline = time.monotonic() + self._connect_seconds
        while len(present) < self._devices:
            self._check_alive()
            if time.monotonic() > deadline:
                raise FederationError(
                    f"devices = {self._devices}: only {len(present)} joined within {self._connect_seconds:.0f} s; "
                    "start the missing SuperNodes, or lower devices"
                )
            time.sleep(min(0.1, self._poll_seconds))
            present = set(self._grid.get_node_ids())
        return present

    def _deliver(
        self, contents: Iterable[tuple[int, int | None, RecordDict]], message_type: str
    ) -> Iterator[tuple[int, Message | str]]:
        """Send (index, node, content) triples; yields (index, reply or why there is none) in order of arrival.

        Contents are drawn when they are sent: those that were answered need no memory any more.
        """
        queue, waiting = iter(contents), dict[str, int]()
        yield from self._send(queue, waiting, message_type)
        for answer in self._collect(waiting):
            yield answer
            yield from self._send(queue, waiting, message_type)

    def _send(
        self, queue: Iterator[tuple[int, int | None, RecordDict]], waiting: dict[str, int], message_type: str
    ) -> Iterator[tuple[int, str]]:
        """Send until enough are waiting; yields (index, why not) of those that cannot be sent."""
        most = self._devices if self._stand_in else math.inf
        while len(waiting) < most and (item := next(queue, None)) is not None:
            index, node, content = item
            if node is None:
                yield index, "the device is not connected"
                continue
            message = Message(content, node, message_type, ttl=self._timeout_seconds)
            # One by one: a push of many large messages can exceed the limit of one HTTP request.
            sent = [sent_id for sent_id in self._grid.push_messages([message]) if sent_id]
            if sent:
                waiting[sent[0]] = index
            else:
                yield index, "the message could not be sent"

    def _collect(self, waiting: dict[str, int]) -> Iterator[tuple[int, Message | str]]:
        started = time.monotonic()
        pause = FIRST_POLL_SECONDS
        while waiting:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                yield waiting.pop(reply.metadata.reply_to_message_id), reply
            if replies:
                pause = FIRST_POLL_SECONDS
                continue
            if self._timeout_seconds is not None and time.monotonic() - started > self._timeout_seconds:
                for index in waiting.values():
                    yield index, f"no reply within {self._timeout_seconds:g} s"
                return
            self._check_alive()
            time.sleep(pause)
            pause = min(pause * POLL_GROWTH, self._poll_seconds)


def _number(identity: int | str, numbers: Mapping[str, int]) -> int:
    return numbers[identity] if isinstance(identity, str) else identity


def _check_distinct(identities: Iterable[int | str], devices: int, numbers: Mapping[str, int]) -> None:
    seen: set[int | str] = set()
    for identity in identities:
        key = "name" if isinstance(identity, str) else "partition-id"
        if identity in seen:
            raise FederationError(f"{key} = {identity}: two SuperNodes have it; give each its own {_WHAT[key]}")
        if isinstance(identity, str) and identity not in numbers:
            raise FederationError(f"name = {identity}: the run began with {', '.join(numbers)}; join as one of them")
        if not 0 <= _number(identity, numbers) < devices:
            raise FederationError(f"{key} = {identity}: must be from 0 to {devices - 1} when devices = {devices}")
        seen.add(identity)


_WHAT = {"name": "name", "partition-id": "number"}


def _content(reply: Message | str) -> RecordDict | str:
    """The records of a reply, or why there are none. Errors: the `FedSpineError` that a device sent."""
    if isinstance(reply, str):
        return reply
    if reply.has_error():
        return " ".join((reply.error.reason or f"Flower error {reply.error.code}").split())[:LONGEST_REASON]
    failure = records.read_failure(reply.content)
    return reply.content if failure is None else failure


def _needed(reply: Message | str, device: int, what: str) -> RecordDict:
    answer = _content(reply)
    if isinstance(answer, str):
        raise FederationError(f"device {device} did not answer {what}: {answer}")
    return answer
