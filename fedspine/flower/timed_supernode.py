"""Flower's SuperNode with a stopwatch on its link: `python -m fedspine.flower.timed_supernode`, options as of
`flower-supernode`.

What a device sends and receives passes through the SuperNode, before and after the process that trains; so only here
can it be timed. Waiting is not counted: a SuperNode asks for messages every three seconds.

It also shows itself more often than Flower's, so that the server knows sooner when it died, has more patience with the
processes of its messages, and starts them by a SuperExec of its own (`superexec`), with which it ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any

from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supercore import heartbeat, log
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.exit import ExitCode, add_exit_handler, flwr_exit
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.nodestate import nodestate_factory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from fedspine.devices.measured import LINK_VARIABLE, Link, write_link
from fedspine.flower.superexec import superexec_command
from fedspine.health import answered

HEARTBEAT_SECONDS = 15
"""Flower takes a device for gone when it has not been heard of for twice as long."""
START_SECONDS = 600
"""That the process for a message may need to start."""
STOP_SECONDS = 2.0
"""For a SuperNode to begin to end, when it was stopped together with its SuperExec."""


class PatientState(InMemoryNodeState):
    """Where a SuperNode keeps what it has to do. Flower starts a second process for a message when the first has not
    shown itself after 30 seconds, and a third: on a slow device each keeps the others from ever getting there.
    """

    def claim_task(self, task_id: int) -> str | None:
        token = super().claim_task(task_id)
        if token is not None:
            with self.lock_task_store:
                self.task_token_store[task_id].active_until += timedelta(seconds=START_SECONDS)
        return token


class _Traffic:
    """Bytes of a message one way, and the time in which at least one of its parts was on its way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self.bytes = 0
        self.seconds = 0.0

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.bytes += nbytes

    def __enter__(self) -> None:
        with self._lock:
            if not self._under_way:
                self._since = time.perf_counter()
            self._under_way += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._under_way -= 1
            if not self._under_way:
                self.seconds += time.perf_counter() - self._since


class NotingClient(FleetHttpClient):
    """Notes the answers to heartbeats: a device at work has no others."""

    def SendNodeHeartbeat(self, request: SendNodeHeartbeatRequest) -> SendNodeHeartbeatResponse:
        response = super().SendNodeHeartbeat(request)
        _note(answered, Path(os.environ[LINK_VARIABLE]).parent)
        return response


def _note(write: Callable[[Any], None], what: Any) -> None:
    """A disk that is full, or may not be written, must cost no message."""
    try:
        write(what)
    except OSError as error:
        _warn(f"A device's note for its other processes is left out: {error}")


@lru_cache
def _warn(text: str) -> None:
    """Once, however often it happens."""
    log(WARNING, text)


@contextmanager
def timed_connection(*arguments: Any, **options: Any) -> Iterator[tuple[Any, ...]]:
    """`http_request_response` whose transfers go into the `Link` of this device, and its answers into its health."""
    state = Path(os.environ[LINK_VARIABLE]).parent
    link, down, up = Link(), _Traffic(), _Traffic()

    with http_request_response(*arguments, **options) as connection:
        node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection

        def next_message() -> Any:
            nonlocal link, down, up
            link = link.uploaded(up.bytes, up.seconds)
            down, up = _Traffic(), _Traffic()
            message = receive()
            _note(answered, state)
            return message

        def timed_get_fab(fab_hash: str, run: int) -> Any:
            nonlocal link
            app = _Traffic()
            with app:
                fab = get_fab(fab_hash, run)
            link = link.downloaded(len(fab.content), app.seconds)
            return fab

        def timed_pull(run: int, name: str) -> bytes:
            with down:
                content: bytes = pull_object(run, name)
            down.add(len(content))
            _note(answered, state)
            return content

        def timed_send(*parts: Any) -> Any:
            with up:
                return send(*parts)

        def timed_push(run: int, session: str, name: str, content: bytes) -> None:
            with up:
                push_object(run, session, name, content)
            up.add(len(content))
            _note(answered, state)

        def timed_confirm(run: int, message: str) -> None:
            nonlocal link
            confirm(run, message)
            link = link.downloaded(down.bytes, down.seconds)
            _note(write_link, link)

        yield node_id, next_message, timed_send, get_run, timed_get_fab, timed_pull, timed_push, timed_confirm


def end_with(superexec: subprocess.Popen[bytes]) -> None:
    """End this SuperNode in order when its SuperExec has ended, which answers no more messages: so the server hears
    of it, and `fedspine join` starts another."""
    stopping = threading.Event()
    add_exit_handler(stopping.set, run_before_force_exit=True)

    def watch() -> None:
        status = superexec.wait()
        if not stopping.wait(STOP_SECONDS):
            log(ERROR, "The SuperExec ended (exit status %d): the SuperNode ends with it.", status)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    command = superexec_command(parser.parse_known_args()[0].port)

    @contextmanager
    def joined(*arguments: Any, **options: Any) -> Iterator[tuple[Any, ...]]:
        with timed_connection(*arguments, **options) as connection:
            end_with(subprocess.Popen(command))  # only now: a device that is refused needs none
            yield connection

    vars(start_client_internal)["http_request_response"] = joined
    vars(fleet_http_connection)["FleetHttpClient"] = NotingClient
    vars(nodestate_factory)["InMemoryNodeState"] = PatientState
    for module in (heartbeat, fleet_http_connection):
        vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT_SECONDS
    start_parent_process_monitor(os.getppid())  # a `fedspine join` that was killed must not stay joined
    flower_supernode()  # returns after an error in a connection that was there; its Runtime API would run on
    flwr_exit(ExitCode.SUCCESS, "The connection to the SuperLink is lost.")


if __name__ == "__main__":
    main()
