"""`InlineGrid`: Flower's grid without processes. It calls the `ClientApp` directly, one message at a time.

Messages are serialised and parsed on the way, so that a run here is the run of any other grid, bit for bit. A reply is
computed when it is pulled: progress is live and nothing is held back.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedspine.flower.client_app import TRAIN, TrainGroup, answer_group, one_line

RUN_ID = 1
FIRST_NODE_ID = 1000


class InlineGrid(Grid):
    """`devices` nodes in this process; node `1000 + i` has partition `i` and keeps its own context.

    `train_group`: trains up to `group_size` devices at once, in place of the app's own function.
    """

    def __init__(
        self, client_app: ClientApp, devices: int, train_group: TrainGroup | None = None, group_size: int = 1
    ) -> None:
        self._client_app = client_app
        self._train_group = train_group
        self._group_size = group_size
        self._contexts = {FIRST_NODE_ID + index: _context(index, devices) for index in range(devices)}
        self._pending: dict[str, bytes] = {}
        self._sent = 0
        self._run = Run.create_empty(RUN_ID)
        # Flower builds a message only inside a task.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages for `pull_messages`; returns their ids."""
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
            self._pending[str(self._sent)] = message_to_proto(message).SerializeToString()
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the first of these messages (or group of them) run, in the order in which they were sent."""
        wanted = set(message_ids)
        keys = [key for key in self._pending if key in wanted]
        if not keys:
            return []
        first = _parsed(self._pending.pop(keys[0]))
        if self._train_group is None or first.metadata.message_type != TRAIN:
            return [self._handle(first)]
        others = [_parsed(self._pending.pop(key)) for key in keys[1 : self._group_size]]
        return [_wired(reply) for reply in answer_group([first, *others], self._train_group)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Let every message run at once. There is nothing to wait for, so `timeout` has no effect."""
        return [reply for key in self.push_messages(messages) for reply in self.pull_messages([key])]

    def _handle(self, message: Message) -> Message:
        try:
            reply = self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # what Flower's runtimes do with an exception of a client
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code=code, reason=one_line(error)), reply_to=message)
        return _wired(reply)


def _context(index: int, devices: int) -> Context:
    return Context(
        run_id=RUN_ID,
        node_id=FIRST_NODE_ID + index,
        node_config={"partition-id": index, "num-partitions": devices},
        state=RecordDict(),
        run_config={},
    )


def _wired(message: Message) -> Message:
    return _parsed(message_to_proto(message).SerializeToString())


def _parsed(wire: bytes) -> Message:
    return message_from_proto(ProtoMessage.FromString(wire))
