"""What the operator of a SuperLink tells it: which devices it accepts, and what it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from fedspine.errors import FederationError

Request = TypeVar("Request")
Reply = TypeVar("Reply")

ONLINE, UNREGISTERED, FINISHED, COMPLETED = "online", "unregistered", "finished", "completed"
"""Words of Flower's, for nodes and runs."""
TIMEOUT_SECONDS = 90.0
"""Of a request. The SuperLink may wait a minute for its database (`guarded_superlink`)."""
PATIENCE_SECONDS = 300.0
"""That questions may go unanswered while the SuperLink lives."""
AGAIN_SECONDS = 2.0
"""From a question that was not answered to the next."""


class Unanswered(FederationError):
    """The SuperLink is gone, too slow, or cannot do what it should."""


@dataclass(frozen=True)
class RunState:
    """How far a run of the SuperLink is."""

    finished: bool
    completed: bool
    details: str
    """Why it failed."""


class Control:
    """The control interface of a SuperLink at HOST:PORT; without an `authority` it is spoken to in plain text.

    A question that is not answered is put again for some minutes. `check_alive` raises when the SuperLink has ended.
    """

    def __init__(self, address: str, authority: Path | None, check_alive: Callable[[], None]) -> None:
        self._check_alive = check_alive
        self._client = ControlHttpClient(
            f"{'https' if authority else 'http'}://{address}",
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            verify=str(authority) if authority else False,
            timeout=TIMEOUT_SECONDS,
        )

    def answers(self) -> bool:
        try:
            _asked(self._client.ListNodes, ListNodesRequest())
        except Unanswered:
            return False
        return True

    def accept_only(self, keys: Mapping[str, bytes]) -> dict[str, int]:
        """Register the public keys (PEM by name) that the SuperLink does not know, and forget the others.

        Returns the node by name.
        """
        known = {node.public_key: node.node_id for node in self._nodes()}
        for key, node_id in known.items():
            if key not in keys.values():
                _asked(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))
        for name, key in keys.items():
            if key not in known:
                _asked(self._client.RegisterNode, RegisterNodeRequest(public_key=key, name=name))
        known = {node.public_key: node.node_id for node in self._nodes()}
        return {name: known[key] for name, key in keys.items()}

    def online(self) -> list[str]:
        """Names of the devices that are connected; without node authentication they are numbers."""
        return sorted(node.name or str(node.node_id) for node in self._nodes() if node.status == ONLINE)

    def start(self, fab: Fab) -> int:
        """Run an app; returns the number of the run."""
        reply = _asked(self._client.StartRun, StartRunRequest(fab=fab_to_proto(fab)))
        if not reply.HasField("run_id"):
            raise FederationError(f"the SuperLink did not start the run: {reply.note}")
        return int(reply.run_id)

    def state(self, run: int) -> RunState:
        status = self._patiently(self._client.ListRuns, ListRunsRequest(run_id=run)).run_dict[run].status
        return RunState(status.status == FINISHED, status.sub_status == COMPLETED, status.details)

    def stop_all(self) -> None:
        """Stop the runs that an earlier SuperLink left behind."""
        for run, about in self._patiently(self._client.ListRuns, ListRunsRequest()).run_dict.items():
            if about.status.status != FINISHED:
                _asked(self._client.StopRun, StopRunRequest(run_id=run))

    def _nodes(self) -> list[NodeInfo]:
        nodes = self._patiently(self._client.ListNodes, ListNodesRequest()).nodes_info
        return [node for node in nodes if node.status != UNREGISTERED]

    def _patiently(self, method: Callable[[Request], Reply], question: Request) -> Reply:
        """The answer to a question that changes nothing. Errors: `FederationError` when none comes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return _asked(method, question)
            except Unanswered:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise
                time.sleep(AGAIN_SECONDS)

    def close(self) -> None:
        self._client.close()


def _asked(method: Callable[[Request], Reply], request: Request) -> Reply:
    """The reply of the SuperLink. Errors: `FederationError` when it refuses, `Unanswered` when there is none."""
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        refusal = FlowerError.from_json(error.response.text)
        kind = Unanswered if error.response.is_server_error else FederationError
        raise kind(f"the SuperLink refused: {refusal.message if refusal else error}") from None
    except httpx.TransportError as error:
        raise Unanswered(f"the SuperLink does not answer any more: {error}") from None
