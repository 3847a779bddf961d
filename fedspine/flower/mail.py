"""Messages to nodes and what comes back, over any Flower `Grid`.

An answer that is not there in time is given up; its node is still at work on it then (`overdue`). When it comes after
all, it is thrown away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

FIRST_POLL_SECONDS = 0.005
POLL_GROWTH = 1.5
FORGOTTEN_AFTER = 4
"""Times the limit after which an answer is not expected any more: its device was started again, for instance."""


def always() -> None:
    """Nothing can be wrong."""


class Mail:
    """Delivers contents to nodes.

    `timeout_seconds`: how long to wait for the replies to one call; None waits without bound. `poll_seconds`: longest
    pause between two looks for replies. `check_alive` is called in every pause and raises when no reply can come any
    more. `most`: messages under way at a time.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        timeout_seconds: float | None = None,
        poll_seconds: float = 1.0,
        check_alive: Callable[[], None] = always,
        most: float = math.inf,
    ) -> None:
        self.grid = grid
        self.poll_seconds = poll_seconds
        self.check_alive = check_alive
        self._timeout_seconds = timeout_seconds
        self._most = most
        self._overdue: dict[str, int] = {}
        self._discarded: list[int] = []

    def deliver(
        self, contents: Iterable[tuple[int, int | None, RecordDict]], message_type: str
    ) -> Iterator[tuple[int, Message | str]]:
        """Send (index, node, content) triples; yields (index, reply or why there is none) in order of arrival.

        Contents are drawn when they are sent: those that were answered need no memory any more.
        """
        queue, waiting = iter(contents), dict[str, tuple[int, int]]()
        yield from self._send(queue, waiting, message_type)
        for answer in self._collect(waiting):
            yield answer
            yield from self._send(queue, waiting, message_type)

    def overdue(self) -> set[int]:
        """Nodes that are at work on a message whose time is over."""
        if self._overdue:
            self._pull(())
        return set(self._overdue.values())

    def discarded(self) -> list[int]:
        """Nodes whose answer came too late, since this was asked last."""
        nodes, self._discarded = self._discarded, []
        return nodes

    def _send(
        self,
        queue: Iterator[tuple[int, int | None, RecordDict]],
        waiting: dict[str, tuple[int, int]],
        message_type: str,
    ) -> Iterator[tuple[int, str]]:
        """Send until enough are waiting; yields (index, why not) of those that cannot be sent."""
        while len(waiting) < self._most and (item := next(queue, None)) is not None:
            index, node, content = item
            if node is None:
                yield index, "the device is not connected"
                continue
            lifetime = self._timeout_seconds and FORGOTTEN_AFTER * self._timeout_seconds
            message = Message(content, node, message_type, ttl=lifetime)
            # One by one: a push of many large messages can exceed the limit of one HTTP request.
            sent = [sent_id for sent_id in self.grid.push_messages([message]) if sent_id]
            if sent:
                waiting[sent[0]] = index, node
            else:
                yield index, "the message could not be sent"

    def _collect(self, waiting: dict[str, tuple[int, int]]) -> Iterator[tuple[int, Message | str]]:
        started = time.monotonic()
        pause = FIRST_POLL_SECONDS
        while waiting:
            replies = self._pull(waiting)
            for reply in replies:
                yield waiting.pop(reply.metadata.reply_to_message_id)[0], reply
            if replies:
                pause = FIRST_POLL_SECONDS
                continue
            if self._timeout_seconds is not None and time.monotonic() - started > self._timeout_seconds:
                for message_id, (index, node) in waiting.items():
                    self._overdue[message_id] = node
                    yield index, f"no reply within {self._timeout_seconds:g} s"
                return
            self.check_alive()
            time.sleep(pause)
            pause = min(pause * POLL_GROWTH, self.poll_seconds)

    def _pull(self, waiting: Iterable[str]) -> list[Message]:
        """The replies that are there; those that are overdue are thrown away."""
        replies = []
        for reply in self.grid.pull_messages([*waiting, *self._overdue]):
            node = self._overdue.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                replies.append(reply)
            elif not reply.has_error():  # Flower answers for a node that is gone, or a message that is too old
                self._discarded.append(node)
        return replies
