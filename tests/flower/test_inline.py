"""The exchange over the in-process grid: order, progress, failures, users' mistakes, identities."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedspine.errors import ConfigError, FederationError, FedSpineError, ModelError
from fedspine.federation import Exchange
from fedspine.flower.client_app import identity, make_client_app, package_root, require_same_root
from fedspine.flower.engines import run_federation
from fedspine.flower.exchange import GridExchange
from fedspine.flower.inline import FIRST_NODE_ID, InlineGrid
from fedspine.flower.server_app import make_server_app
from fedspine.types import FAILED, TRAINED, EvaluateReply, TrainReply
from tests.flower import fakes


@pytest.fixture
def app() -> ClientApp:
    return make_client_app(fakes.train, fakes.probe, fakes.evaluate)


def nothing(_: Any) -> None:
    pass


def test_two_rounds(app: ClientApp) -> None:
    seen: list[int] = []

    def run(exchange: Exchange) -> str:
        for round in (1, 2):
            requests = [fakes.train_request(device, round) for device in (4, 1, 3)]
            replies = exchange.train(requests, lambda reply: seen.append(reply.device))
            assert fakes.flat(replies) == fakes.flat([fakes.train(request) for request in requests])
        probes = exchange.probe([fakes.probe_request(device) for device in (2, 0)])
        assert probes == [fakes.probe(fakes.probe_request(device)) for device in (2, 0)]
        evaluated: list[EvaluateReply] = []
        exchange.evaluate([fakes.evaluate_request(device) for device in range(5)], evaluated.append)
        assert [reply.device for reply in evaluated] == [0, 1, 2, 3, 4]
        return "result"

    assert run_federation(run, devices=5, client_app=app) == "result"
    assert seen == [4, 1, 3, 4, 1, 3]


def test_no_requests_give_no_replies(app: ClientApp) -> None:
    assert run_federation(lambda exchange: exchange.train([], nothing), devices=2, client_app=app) == []


def test_replies_are_computed_one_by_one(app: ClientApp) -> None:
    order: list[str] = []

    def train(request: Any) -> TrainReply:
        order.append(f"train {request.device}")
        return fakes.train(request)

    def run(exchange: Exchange) -> None:
        requests = [fakes.train_request(device) for device in range(2)]
        exchange.train(requests, lambda reply: order.append(f"seen {reply.device}"))

    run_federation(run, devices=2, client_app=make_client_app(train, fakes.probe, fakes.evaluate))
    assert order == ["train 0", "seen 0", "train 1", "seen 1"]


def test_a_failing_device_is_a_failed_reply(app: ClientApp) -> None:
    requests = [fakes.train_request(0), fakes.train_request(1, rank=13), fakes.train_request(2)]
    replies = run_federation(lambda exchange: exchange.train(requests, nothing), devices=3, client_app=app)
    assert [reply.report.outcome for reply in replies] == [TRAINED, FAILED, TRAINED]
    failed = replies[1]
    assert failed.report.message.startswith("ValueError: a broken device (fakes.py:")
    assert (failed.device, failed.structure, dict(failed.arrays), failed.scores) == (1, fakes.STRUCTURE, {}, None)


def test_a_user_mistake_ends_the_run_with_its_message(app: ClientApp) -> None:
    seen: list[TrainReply] = []
    requests = [fakes.train_request(device, rank=14) for device in range(3)]
    with pytest.raises(ModelError) as caught:
        run_federation(lambda exchange: exchange.train(requests, seen.append), devices=3, client_app=app)
    assert str(caught.value) == fakes.USER_MISTAKE
    assert seen == []


def test_a_device_that_cannot_measure_or_evaluate_is_named(app: ClientApp) -> None:
    with pytest.raises(FederationError, match="device 1 did not answer the probe: ValueError: no clock"):
        run_federation(lambda e: e.probe([fakes.probe_request(1, rank=13)]), devices=2, client_app=app)
    with pytest.raises(FederationError, match="device 1 did not answer the evaluation: ValueError: no test set"):
        run_federation(lambda e: e.evaluate([fakes.evaluate_request(1, 13)], nothing), devices=2, client_app=app)


@pytest.mark.parametrize("error", [FederationError("quorum"), KeyboardInterrupt(), ZeroDivisionError("bug")])
def test_what_run_raises_comes_out_unchanged(app: ClientApp, error: BaseException) -> None:
    def run(exchange: Exchange) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_federation(run, devices=1, client_app=app)
    assert caught.value is error


def test_contexts_last_and_are_one_per_device() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.run_config["times"] = int(context.run_config.get("times", 0)) + 1
        return Message(RecordDict(), reply_to=message)

    grid = InlineGrid(app, 2)
    for _ in range(2):
        grid.send_and_receive([Message(RecordDict(), FIRST_NODE_ID, "train")])
    assert [context.run_config for context in grid._contexts.values()] == [{"times": 2}, {}]


def test_a_crash_of_the_app_is_an_error_reply() -> None:
    grid = InlineGrid(ClientApp(), 1)
    (reply,) = grid.send_and_receive([Message(RecordDict(), FIRST_NODE_ID, "train")])
    assert reply.has_error()
    assert "No train function registered" in (reply.error.reason or "")
    with pytest.raises(FederationError, match="no device could say which one it is: ValueError"):
        GridExchange(grid, 1).train([fakes.train_request(0)], nothing)


class SlowGrid(InlineGrid):
    """Two of its nodes never answer, and its nodes join one by one."""

    joined = 0
    deaf: tuple[int, ...] = ()

    def get_node_ids(self) -> list[int]:
        self.joined += 1
        return super().get_node_ids()[: self.joined]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for reply in super().pull_messages(message_ids) if reply.metadata.src_node_id not in self.deaf]


def test_waits_for_devices_and_gives_up_on_silent_ones(app: ClientApp) -> None:
    grid = SlowGrid(app, 3)
    exchange = GridExchange(grid, 3, timeout_seconds=0.05, poll_seconds=0.01)
    assert len(exchange.probe([fakes.probe_request(2)])) == 1
    grid.deaf = (FIRST_NODE_ID + 1,)
    replies = exchange.train([fakes.train_request(device) for device in range(3)], nothing)
    assert [reply.report.message for reply in replies] == ["", "no reply within 0.05 s", ""]


def test_missing_devices_are_an_error(app: ClientApp) -> None:
    with pytest.raises(FederationError, match="devices = 4: only 3 joined within 0 s"):
        GridExchange(InlineGrid(app, 3), 4, connect_seconds=0.01).probe([])


def test_a_device_that_left_fails_and_a_new_node_takes_its_place(app: ClientApp) -> None:
    grid = InlineGrid(app, 3)
    exchange = GridExchange(grid, 3)
    exchange.probe([])
    gone = grid._contexts.pop(FIRST_NODE_ID + 1)
    replies = exchange.train([fakes.train_request(device) for device in (0, 1)], nothing)
    assert [reply.report.message for reply in replies] == ["", "the device is not connected"]
    grid._contexts[4711] = gone
    assert exchange.train([fakes.train_request(1)], nothing)[0].report.outcome == TRAINED


def test_partition_ids_must_be_distinct_and_in_range(app: ClientApp) -> None:
    def identities(change: Callable[[dict[str, Any]], None]) -> None:
        grid = InlineGrid(app, 2)
        change(grid._contexts[FIRST_NODE_ID + 1].node_config)
        GridExchange(grid, 2).probe([])

    with pytest.raises(FederationError, match="partition-id = 0: two SuperNodes have it"):
        identities(lambda config: config.update({"partition-id": 0}))
    with pytest.raises(FederationError, match="partition-id = 2: must be from 0 to 1"):
        identities(lambda config: config.update({"partition-id": 2}))
    with pytest.raises(FederationError, match="partition-id = None: start its SuperNode with"):
        identities(lambda config: config.clear())


def test_the_app_must_lie_next_to_the_package(tmp_path: Any) -> None:
    with pytest.raises(FederationError, match="but Python found fedspine in"):
        require_same_root(str(tmp_path / "clients" / "app.py"))


def test_server_app_takes_the_run_configuration(app: ClientApp) -> None:
    seen: list[Any] = []
    server_app = make_server_app(
        lambda config, exchange: seen.append((config, exchange.probe([fakes.probe_request(1)])))
    )

    def start(run_config: dict[str, Any]) -> None:
        server_app(InlineGrid(app, 4), Context(1, 1, {}, RecordDict(), run_config))

    start({"method": "fedavg", "devices": 4, "sampled": 2, "learning_rate": 1, "policy": "", "lora_targets": "q,v"})
    config, probes = seen[0]
    assert (config.policy, config.devices, config.learning_rate, config.lora_targets) == ("fixed", 4, 1.0, ("q", "v"))
    assert probes == [fakes.probe(fakes.probe_request(1))]
    with pytest.raises(ConfigError, match="unknown key 'device'"):
        start({"device": 4})


@pytest.mark.parametrize("choice", [{"engine": "inlin"}, {"workers": 0}])
def test_wrong_engines_are_refused(app: ClientApp, choice: dict[str, Any]) -> None:
    with pytest.raises(FedSpineError, match=next(iter(choice))):
        run_federation(lambda exchange: None, devices=1, client_app=app, **choice)


def test_a_worker_with_another_copy_of_the_code_is_refused() -> None:
    context = Context(1, 1, {"partition-id": 3}, RecordDict(), {})
    assert identity(context, package_root()) == 3
    with pytest.raises(FederationError, match="a worker imported fedspine from"):
        identity(context, "elsewhere/fedspine")
