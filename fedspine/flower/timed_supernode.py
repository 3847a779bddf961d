"""Flower's SuperNode with a stopwatch on its link: `python -m fedspine.flower.timed_supernode`, options as of
`flower-supernode`.

What a device sends and receives passes through the SuperNode, before and after the process that trains; so only here
can it be timed. Waiting is not counted: a SuperNode asks for messages every three seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_connection import http_request_response

from fedspine.devices.measured import Link, write_link


class _Stopwatch:
    """Times the transfers of one direction of one message, which may be several at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self.began, self.ended, self.bytes = 0.0, 0.0, 0

    def add(self, began: float, nbytes: int) -> None:
        with self._lock:
            self.began = self.began or began
            self.ended = time.perf_counter()
            self.bytes += nbytes

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@contextmanager
def timed_connection(*arguments: Any, **options: Any) -> Iterator[tuple[Any, ...]]:
    """`http_request_response` whose transfers go into the `Link` of this device."""
    down, up = _Stopwatch(), _Stopwatch()
    link = Link()

    with http_request_response(*arguments, **options) as connection:
        node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection

        def timed_receive() -> Any:
            nonlocal link
            link = link.uploaded(up.bytes, up.seconds)
            down.clear()
            up.clear()
            return receive()

        def timed_get_fab(fab_hash: str, run: int) -> Any:
            nonlocal link
            began = time.perf_counter()
            fab = get_fab(fab_hash, run)
            link = link.downloaded(len(fab.content), time.perf_counter() - began)
            return fab

        def timed_pull(run: int, name: str) -> bytes:
            began = time.perf_counter()
            content = pull_object(run, name)
            down.add(began, len(content))
            return content

        def timed_send(*parts: Any) -> Any:
            began = time.perf_counter()
            answer = send(*parts)
            up.add(began, 0)
            return answer

        def timed_push(run: int, session: str, name: str, content: bytes) -> None:
            began = time.perf_counter()
            push_object(run, session, name, content)
            up.add(began, len(content))

        def timed_confirm(run: int, message: str) -> None:
            nonlocal link
            confirm(run, message)
            link = link.downloaded(down.bytes, down.seconds)
            write_link(link)

        yield node_id, timed_receive, timed_send, get_run, timed_get_fab, timed_pull, timed_push, timed_confirm


if __name__ == "__main__":
    vars(start_client_internal)["http_request_response"] = timed_connection
    flower_supernode()
