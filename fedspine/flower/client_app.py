"""The Flower `ClientApp`: a thin shell around three pure functions of a request.

An error that a person caused (`FedSpineError`) travels back as itself and ends the run. Any other becomes one line,
and the server counts the device as failed; the whole traceback goes to the log of the device at level INFO.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedspine
from fedspine.errors import FederationError, FedSpineError
from fedspine.flower import records
from fedspine.flower.node import Node
from fedspine.importing import load
from fedspine.types import EvaluateReply, EvaluateRequest, Probe, ProbeRequest, TrainReply, TrainRequest

IDENTIFY = "query.identify"
PROBE = "query.probe"
TRAIN = "train"
EVALUATE = "evaluate"
"""The message types that the app answers."""

TrainGroup = Callable[[Sequence[TrainRequest]], list[TrainReply]]
Request = TypeVar("Request")
Reply = TypeVar("Reply")
Asked = TypeVar("Asked", TrainRequest, ProbeRequest, EvaluateRequest)


def at_work(function: str, **options: Any) -> Callable[[Any], Any]:
    """A function of `fedspine.client_round`, which takes seconds to import: only once there is work."""

    def work(request: Any) -> Any:
        return getattr(load("fedspine.client_round"), function)(request, **options)

    return work


def make_client_app(
    train: Callable[[TrainRequest], TrainReply],
    probe: Callable[[ProbeRequest], Probe],
    evaluate: Callable[[EvaluateRequest], EvaluateReply],
) -> ClientApp:
    """The app of a device. Which device it is, and which data it has, comes from its node configuration."""
    app = ClientApp()
    # Ray pickles these functions by value: `root` is where the server's process found the package.
    root = package_root()

    @app.query("identify")
    def on_identify(message: Message, context: Context) -> Message:
        return _answer(message, lambda _: identity(context, root), lambda device: device, records.pack_identity)

    @app.query("probe")
    def on_probe(message: Message, context: Context) -> Message:
        return _answer(message, records.unpack_probe_request, _as_node(context, probe), records.pack_probe)

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        return _answer(message, records.unpack_train_request, _as_node(context, train), records.pack_train_reply)

    @app.evaluate()
    def on_evaluate(message: Message, context: Context) -> Message:
        return _answer(
            message, records.unpack_evaluate_request, _as_node(context, evaluate), records.pack_evaluate_reply
        )

    return app


def package_root() -> str:
    """The folder that this process imported `fedspine` from."""
    return str(Path(fedspine.__file__).resolve().parent)


def require_same_root(app_file: str) -> None:
    """Check that an app module lies next to the `fedspine` that was imported.

    Errors: `FederationError` when another installation of the package, or another folder of that name, came first.
    """
    beside = Path(app_file).resolve().parents[1] / "fedspine"
    if str(beside) != package_root():
        raise FederationError(
            f"{app_file} belongs to the code in {beside.parent}, but Python found fedspine in {package_root()}: "
            "start from another folder, or uninstall the other copy"
        )


def identity(context: Context, server_root: str) -> int | str:
    """The number or the name of the device that a node stands for.

    Errors: `FederationError` when it has neither, or when server and device run different copies of the code.
    """
    if package_root() != server_root:
        raise FederationError(
            f"a worker imported fedspine from {package_root()}, the server from {server_root}: "
            "start from a folder that holds no other 'fedspine'"
        )
    return Node.of(context.node_config).identity


def _as_node(context: Context, work: Callable[[Asked], Reply]) -> Callable[[Asked], Reply]:
    """`work` under the run's configuration as it holds for this device. A person's mistake is told with its name."""

    def working(request: Asked) -> Reply:
        node = Node.of(context.node_config)
        try:
            return work(replace(request, settings=node.settings(request.settings)))
        except FedSpineError as error:
            if isinstance(node.identity, str):
                raise type(error)(f"device {node.identity}: {error}") from None
            raise

    return working


def _answer(
    message: Message,
    unpack: Callable[[RecordDict], Request],
    work: Callable[[Request], Reply],
    pack: Callable[[Reply], RecordDict],
) -> Message:
    return Message(_content(lambda: pack(work(unpack(message.content)))), reply_to=message)


def answer_group(messages: Sequence[Message], train_group: TrainGroup) -> list[Message]:
    """The replies of devices that train at once. An error is that of all of them."""
    replies: list[TrainReply] = []

    def work() -> RecordDict:
        replies.extend(train_group([records.unpack_train_request(message.content) for message in messages]))
        return RecordDict()

    failure = _content(work)
    contents = [records.pack_train_reply(reply) for reply in replies] or [failure] * len(messages)
    return [Message(content, reply_to=message) for content, message in zip(contents, messages, strict=True)]


def _content(work: Callable[[], RecordDict]) -> RecordDict:
    try:
        return work()
    except FedSpineError as error:
        return records.pack_user_error(error)
    except Exception as error:  # a device that fails must not end the round: the server counts it as failed
        logging.getLogger("fedspine").info("the device failed", exc_info=True)
        return records.pack_failure(one_line(error))


def one_line(error: Exception) -> str:
    """Type, text and place of an exception, without line breaks."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
