"""Which device a node is. Node ids mean nothing, so a node is asked for its number or its name.

Names are numbered in their order: those that the server knows beforehand, or else those of the nodes that are there at
the start. Where devices have keys, a node's key says whose name it may bear.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flwr.app import Message, RecordDict

from fedspine.errors import FederationError, FedSpineError
from fedspine.exchange import LONGEST_REASON
from fedspine.flower import records
from fedspine.flower.client_app import IDENTIFY
from fedspine.flower.mail import Mail
from fedspine.run_directory import first_names, write_names


class Roster:
    """The devices of a federation behind the nodes of a grid.

    `names`: of all devices, where they are known. `nodes`: those that have the key of each, where devices have keys.
    `least`: nodes that must have joined before the first look, within `connect_seconds`. `lenient`: a node that does
    not fit and joins later is left out, where it is an error otherwise. `directory`: of the run, which keeps the names:
    when it is continued they have the numbers of before.
    """

    def __init__(
        self,
        mail: Mail,
        devices: int,
        *,
        least: int,
        connect_seconds: float,
        names: Sequence[str] = (),
        nodes: Mapping[str, int] | None = None,
        lenient: bool = False,
        directory: Path | None = None,
    ) -> None:
        self._mail = mail
        self._devices = devices
        self._least = least
        self._connect_seconds = connect_seconds
        self._lenient = lenient
        self._directory = directory
        names = first_names(directory, names) if directory else names
        self._numbers = {name: number for number, name in enumerate(names)}
        self._owners = {node: name for name, node in (nodes or {}).items()}
        self._identities: dict[int, int | str] = {}

    def connected(self) -> dict[int, int]:
        """Device by node id, of the nodes that are there now and have said who they are. The first call waits for them.

        Errors: `FederationError` when too few join, or some that do not fit are there at the start.
        """
        present = set(self._mail.grid.get_node_ids())
        starting = not self._identities
        if starting:
            present = self._await_nodes(present)
        strangers = sorted(present - self._identities.keys() - self._mail.overdue())
        contents = ((index, node, RecordDict()) for index, node in enumerate(strangers))
        reason, silent = "", True
        for index, reply in self._mail.deliver(contents, IDENTIFY):
            silent = silent and isinstance(reply, str)
            try:
                answer = content(reply)
                if isinstance(answer, str):
                    reason = answer
                else:
                    self._identities[strangers[index]] = records.unpack_identity(answer)
            except FedSpineError as error:
                if starting or not self._lenient:
                    raise
                _leave_out(str(error))
        if not self._identities:
            if self._lenient and silent:  # at work still, for a server that was killed
                return {}
            raise FederationError(f"no device could say which one it is: {reason}")
        if not self._numbers:
            names = sorted(each for node, each in self._identities.items() if isinstance(each, str) and node in present)
            if names and reason:
                raise FederationError(f"a device could not say which one it is: {reason}")
            self._numbers = {name: number for number, name in enumerate(names)}
        seen: dict[int | str, int] = {}
        for node, identity in list(self._identities.items()):  # the longest known first
            if node not in present:
                continue
            if problem := self._problem(node, identity, seen):
                if starting or not self._lenient:
                    raise FederationError(problem)
                _leave_out(problem)
                del self._identities[node]  # asked again, when it is still there
                continue
            seen[identity] = node
        if starting and self._directory and self._numbers:
            write_names(self._directory, self._numbers)
        return {node: self._number(identity) for identity, node in seen.items()}

    def devices_of(self, nodes: Iterable[int]) -> tuple[int, ...]:
        """That these nodes were, in ascending order."""
        return tuple(sorted({self._number(self._identities[node]) for node in nodes if node in self._identities}))

    def _await_nodes(self, present: set[int]) -> set[int]:
        deadline = time.monotonic() + self._connect_seconds
        while len(present) < self._least:
            self._mail.check_alive()
            if time.monotonic() > deadline:
                raise FederationError(
                    f"devices = {self._devices}: only {len(present)} joined within {self._connect_seconds:.0f} s; "
                    "start the missing SuperNodes, or lower devices"
                )
            time.sleep(min(0.1, self._mail.poll_seconds))
            present = set(self._mail.grid.get_node_ids())
        return present

    def _number(self, identity: int | str) -> int:
        return self._numbers[identity] if isinstance(identity, str) else identity

    def _problem(self, node: int, identity: int | str, seen: Mapping[int | str, int]) -> str | None:
        """Why a node with this identity cannot take part."""
        key, what = ("name", "name") if isinstance(identity, str) else ("partition-id", "number")
        if self._owners and identity != (owner := self._owners.get(node)):
            return (
                f"{key} = {identity}: this device has the key of {owner}; join as {owner}, or with {identity}'s own key"
            )
        if self._numbers and not isinstance(identity, str):
            return f"{key} = {identity}: the devices of this run have names; join with --name"
        if identity in seen:
            return f"{key} = {identity}: two SuperNodes have it; give each its own {what}"
        if isinstance(identity, str) and identity not in self._numbers:
            return f"name = {identity}: the run began with {', '.join(self._numbers)}; join as one of them"
        if not 0 <= self._number(identity) < self._devices:
            return f"{key} = {identity}: must be from 0 to {self._devices - 1} when devices = {self._devices}"
        return None


def _leave_out(problem: str) -> None:
    logging.getLogger("fedspine").warning("a device that joined is left out: %s", problem)


def content(reply: Message | str) -> RecordDict | str:
    """The records of a reply, or why there are none. Errors: the `FedSpineError` that a device sent."""
    if isinstance(reply, str):
        return reply
    if reply.has_error():
        return " ".join((reply.error.reason or f"Flower error {reply.error.code}").split())[:LONGEST_REASON]
    failure = records.read_failure(reply.content)
    return reply.content if failure is None else failure
