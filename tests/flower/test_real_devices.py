"""Devices that come and go, answer too late, answer nonsense or lack memory: without processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedspine import client_round
from fedspine.config import RunConfig
from fedspine.devices.measured import LINK_VARIABLE, Link, MeasuredMeter, write_link
from fedspine.errors import FederationError, ModelError
from fedspine.exchange import Attendance, Exchange, checked
from fedspine.flower import records
from fedspine.flower.client_app import at_work, make_client_app
from fedspine.flower.engines import run_federation
from fedspine.flower.exchange import GridExchange
from fedspine.flower.inline import FIRST_NODE_ID, InlineGrid
from fedspine.lora.adapters import narrow
from fedspine.simulation import run_server
from fedspine.structure import Structure
from fedspine.types import (
    FAILED,
    OUT_OF_MEMORY,
    TRAINED,
    Action,
    EvaluateReply,
    Probe,
    Report,
    TrainReply,
    TrainRequest,
)
from tests.flower import fakes
from tests.small_run import KEYS, write_data, write_model
from tests.tiny import even_structure, random_arrays, random_scores, tiny_resident

APP: ClientApp = make_client_app(fakes.train, fakes.probe, fakes.evaluate)


class Network(InlineGrid):
    """Nodes that are `gone`, or `slow`: whose answers are not there yet."""

    def __init__(self, devices: int) -> None:
        super().__init__(APP, devices)
        self.gone: set[int] = set()
        self.slow: set[int] = set()
        self._done: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node not in self.gone]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        for reply in super().pull_messages(message_ids):
            self._done[reply.metadata.reply_to_message_id] = reply
        here = [key for key, reply in self._done.items() if reply.metadata.src_node_id not in self.slow]
        return [self._done.pop(key) for key in here if key in message_ids]


def exchange(grid: InlineGrid, devices: int, **options: Any) -> GridExchange:
    return GridExchange(grid, devices, real=True, poll_seconds=0.01, timeout_seconds=0.1, **options)


def trained(over: Exchange, devices: Iterable[int], round: int = 1) -> list[str]:
    replies = over.train([fakes.train_request(device, round) for device in devices], lambda _: None)
    return [reply.report.outcome for reply in replies]


def test_a_late_answer_is_discarded_and_its_device_left_alone_until_then() -> None:
    grid = Network(3)
    over = exchange(grid, 3)
    assert over.attendance(3) == Attendance()
    grid.slow = {FIRST_NODE_ID + 1}
    assert trained(over, range(3)) == [TRAINED, FAILED, TRAINED]
    assert over.attendance(2) == Attendance(frozenset({1}))
    assert trained(over, (0, 2), 2) == [TRAINED, TRAINED]
    grid.slow = set()
    assert over.attendance(3) == Attendance(discarded=(1,))
    assert over.attendance(3) == Attendance()
    assert trained(over, range(3), 3) == [TRAINED] * 3


def test_too_few_devices_are_waited_for_and_then_an_error() -> None:
    grid = Network(3)
    over = exchange(grid, 3, connect_seconds=0.05)
    over.attendance(3)
    grid.gone = {FIRST_NODE_ID, FIRST_NODE_ID + 2}
    assert over.attendance(1) == Attendance(frozenset({0, 2}))
    with pytest.raises(FederationError, match="only 1 devices are there, and a round needs 2 "):
        over.attendance(2)


def test_devices_that_are_at_work_for_a_killed_server_are_waited_for() -> None:
    grid = Network(2)
    grid.slow = set(grid._contexts)
    over = exchange(grid, 2, connect_seconds=5)
    threading.Timer(0.3, grid.slow.clear).start()
    assert over.attendance(2).away == frozenset()


def test_a_named_device_may_come_later_and_a_stranger_is_left_out() -> None:
    grid = Network(4)
    for (node, context), name in zip(grid._contexts.items(), ("b", "c", "x", "b"), strict=True):
        context.node_config = {"name": name}
        grid.gone.add(node)
    first, second, _, double = grid._contexts
    grid.gone -= {second}
    over = exchange(grid, 3, names=("a", "b", "c"), least=1)
    assert over.attendance(1) == Attendance(frozenset({0, 1}))
    grid.gone.clear()
    assert over.attendance(1) == Attendance(frozenset({0}))
    assert over._roster.connected() == {first: 1, second: 2}
    grid.gone = {first}
    assert over._roster.connected() == {second: 2, double: 1}


def test_a_device_cannot_take_the_name_of_another() -> None:
    grid = Network(4)
    for context, name in zip(grid._contexts.values(), ("a", "a", "a", "c"), strict=True):
        context.node_config = {"name": name}
    false, first, number, third = grid._contexts
    grid._contexts[number].node_config = {"partition-id": 0}
    nodes = {"a": first, "b": false, "c": third, "d": number}
    with pytest.raises(FederationError, match="name = a: this device has the key of b; join as b, or with a's own key"):
        exchange(grid, 4, names=tuple("abcd"), nodes=nodes).attendance(1)
    grid.gone = {false, number}
    over = exchange(grid, 4, names=tuple("abcd"), nodes=nodes, least=2)
    assert over.attendance(2) == Attendance(frozenset({1, 3}))
    grid.gone.clear()
    assert over._roster.connected() == {first: 0, third: 2}
    grid.gone = {first}
    assert over._roster.connected() == {third: 2}


def test_a_late_node_that_does_not_say_who_it_is_is_left_out() -> None:
    grid = Network(4)
    first, second, *late = grid._contexts
    for node, who in zip(grid._contexts, ({"name": "a"}, {"name": "b"}, {}, {"partition-id": 1}), strict=True):
        grid._contexts[node].node_config = who
    grid.gone = set(late)
    over = exchange(grid, 2)
    assert over.attendance(2).away == frozenset()
    grid.gone.clear()
    assert over._roster.connected() == {first: 0, second: 1}
    assert trained(over, range(2)) == [TRAINED, TRAINED]


def test_a_real_device_that_cannot_measure_or_evaluate_is_left_out() -> None:
    over = exchange(InlineGrid(APP, 2), 2)
    assert over.probe([fakes.probe_request(1, rank=13), fakes.probe_request(0)]) == [
        None,
        fakes.probe(fakes.probe_request(0)),
    ]
    assert over.evaluate([fakes.evaluate_request(1, 13)], lambda _: None) == [None]


def test_a_mistake_ends_the_run_at_its_start_and_later_fails_the_device() -> None:
    over = exchange(InlineGrid(APP, 2), 2)
    mistaken = [fakes.train_request(1, rank=14)]
    with pytest.raises(ModelError, match=fakes.USER_MISTAKE):
        over.train(mistaken, lambda _: None)
    trained(over, [0])
    (reply,) = over.train(mistaken, lambda _: None)
    assert (reply.report.outcome, reply.report.message) == (FAILED, fakes.USER_MISTAKE)


def test_a_process_that_was_killed_has_run_out_of_memory() -> None:
    class Killing(InlineGrid):
        def _handle(self, message: Message) -> Message:
            if message.metadata.message_type != "train":
                return super()._handle(message)
            return Message(Error(ErrorCode.CLIENT_APP_CRASHED, "ClientApp stopped responding."), reply_to=message)

    over = exchange(Killing(APP, 1), 1)
    (reply,) = over.train([fakes.train_request(0)], lambda _: None)
    assert reply.report.outcome == OUT_OF_MEMORY
    assert "was killed" in reply.report.message


# What a device sends


RESIDENT = tiny_resident()
SHAPE = RESIDENT.shape
GLOBAL = random_arrays(RESIDENT)
FULL, HALF = Structure.full(SHAPE), even_structure(SHAPE)
REQUEST = TrainRequest(1, 0, Action(0.5, 4), FULL, narrow(GLOBAL, FULL, 4, SHAPE), random_scores(SHAPE), "")
GOOD = TrainReply(
    0,
    Report(TRAINED, examples=7, compute_seconds=2.0, rank_after=4, wall={"seconds": 1.0}),
    HALF,
    narrow(GLOBAL, HALF, 4, SHAPE),
    random_scores(SHAPE),
)
NAME = f"{SHAPE.modules[0].name}.B"


def check(reply: TrainReply, request: TrainRequest = REQUEST, **keys: Any) -> Report:
    """The report of what is made of a reply; nothing else of it is left when it is rejected."""

    def shapes(structure: Structure, ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in narrow(GLOBAL, structure, ranks, SHAPE).items()}

    taken = checked(reply, request, RunConfig.from_values(keys), SHAPE, shapes)
    if taken is not reply:
        assert (taken.report.outcome, taken.device) == (FAILED, reply.device)
        assert (taken.structure, dict(taken.arrays), taken.scores) == (request.structure, {}, None)
    return taken.report


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_does_not_reach_the_other_devices(value: float) -> None:
    assert check(GOOD) is GOOD.report
    bad = replace(GOOD, arrays={**GOOD.arrays, NAME: GOOD.arrays[NAME] * np.float32(value)})
    assert check(bad).message == f"rejected: NaN or infinity in {NAME}"
    assert GOOD.scores is not None
    poisoned = tuple((heads * value, channels) for heads, channels in GOOD.scores)
    assert check(replace(GOOD, scores=poisoned)).message == "rejected: NaN or infinity in scores"


EMPTY = Structure.from_masks([(np.zeros(SHAPE.heads, bool), np.zeros(SHAPE.channels, bool))] * SHAPE.layers)
SHORT = replace(HALF, head_bits=HALF.head_bits[:1], channel_bits=HALF.channel_bits[:1])
LONG = replace(HALF, channel_bits=tuple(bits + bytes(9) for bits in HALF.channel_bits))
UNFIT: list[tuple[TrainReply, str]] = [
    (replace(GOOD, arrays={}), "head.weight is absent, asked for (3, 24)"),
    (replace(GOOD, arrays={**GOOD.arrays, "x\ny": GLOBAL[NAME]}), "x y is (24, 6), asked for none"),
    (replace(GOOD, arrays={**GOOD.arrays, NAME: GLOBAL[NAME]}), f"{NAME} is (24, 6), asked for (12, 4)"),
    (replace(GOOD, arrays={**GOOD.arrays, NAME: np.float32(1)}), f"{NAME} is (), asked for"),
    (replace(GOOD, arrays=narrow(GLOBAL, HALF, 3, SHAPE)), "asked for (4, 24)"),
    *((replace(GOOD, structure=each), "its structure is not one that") for each in (EMPTY, SHORT, LONG)),
    (replace(GOOD, structure=replace(HALF, heads=5)), "its structure is not one that"),
    (replace(GOOD, scores=()), "its scores are not of this model"),
    (replace(GOOD, scores=random_scores(SHAPE)[:1]), "its scores are not of this model"),
    (replace(GOOD, scores=((np.ones(1, np.float32),) * 2,) * SHAPE.layers), "its scores are not of this model"),
    (
        replace(GOOD, scores=((np.ones(SHAPE.heads, complex), np.ones(SHAPE.channels, complex)),) * SHAPE.layers),  # type: ignore[arg-type]
        "its arrays or scores are not of type float32",
    ),
]


@pytest.mark.parametrize(("reply", "words"), UNFIT)
def test_what_does_not_fit_the_request_does_not_reach_the_other_devices(reply: TrainReply, words: str) -> None:
    report = check(reply)
    assert words in report.message
    assert report.compute_seconds == 2.0  # it has cost the device that


REPORTS: list[tuple[dict[str, Any], str]] = [
    ({"examples": 0}, "examples = 0"),
    ({"examples": -5}, "examples = -5"),
    ({"examples": 2**40}, "examples = 1099511627776"),
    ({"compute_seconds": np.nan}, "compute_seconds = nan"),
    ({"upload_seconds": -1.0}, "upload_seconds = -1.0"),
    ({"upload_bytes": -1}, "upload_bytes = -1"),
    ({"loss_after": np.inf}, "loss_after = inf"),
    ({"outcome": "won"}, "outcome = 'won'"),
    ({"outcome": OUT_OF_MEMORY, "compute_seconds": np.inf}, "compute_seconds = inf"),
    ({"wall": {"tune": np.nan}}, "tune = nan"),
    ({"rank_after": 5}, "rank_after = 5, asked for 4"),
    ({"rank_after": 3}, "rank_after = 3, asked for 4"),
    ({"module_salience": (1.0,)}, "module_salience of 1 projections"),
    ({"module_salience": (np.nan,) * len(SHAPE.modules)}, "module_salience = nan"),
]


@pytest.mark.parametrize(("changes", "words"), REPORTS)
def test_what_nobody_can_have_measured_is_rejected(changes: dict[str, Any], words: str) -> None:
    assert check(replace(GOOD, report=replace(GOOD.report, **changes))).message == f"rejected: {words}"


def test_a_device_may_cut_within_a_round_only_where_it_was_sent_scores() -> None:
    planned = replace(REQUEST, scores=None)
    assert check(GOOD, planned).message.startswith("rejected: its structure")
    whole = replace(GOOD, structure=FULL, arrays=narrow(GLOBAL, FULL, 4, SHAPE))
    assert check(whole, planned) is whole.report
    assert check(whole, replace(REQUEST, structure=HALF, arrays=GOOD.arrays)).message.startswith("rejected: its struct")


def test_a_device_may_drop_components_where_ranks_decay() -> None:
    fewer = replace(GOOD, arrays=narrow(GLOBAL, HALF, 2, SHAPE), report=replace(GOOD.report, rank_after=2))
    assert check(fewer, method="hetlora") is fewer.report
    assert check(fewer).message == "rejected: rank_after = 2, asked for 4"


class Babble(InlineGrid):
    """Device 1 answers with what it likes."""

    def __init__(self, content: RecordDict, kind: str = "") -> None:
        super().__init__(APP, 2)
        self.said = content
        self.kind = kind

    def _handle(self, message: Message) -> Message:
        if message.metadata.dst_node_id == FIRST_NODE_ID + 1 and self.kind in message.metadata.message_type:
            return Message(self.said, reply_to=message)
        return super()._handle(message)


def other(content: RecordDict, record: str, **values: Any) -> RecordDict:
    """A reply in which something is another."""
    changed = RecordDict(dict(content))
    changed[record] = ConfigRecord({**dict(content[record]), **values})  # type: ignore[arg-type]
    return changed


REPLY = records.pack_train_reply(fakes.train(fakes.train_request(1)))
NONSENSE = (
    RecordDict(),
    RecordDict({"task": ConfigRecord({})}),
    other(REPLY, "report", outcome=5),
    other(REPLY, "report", telepathy=1.0),
    other(REPLY, "structure", **{"head-bits": [10**12]}),
    other(REPLY, "task", **{"module-salience": ["x"]}),
    RecordDict({**dict(REPLY), "arrays": ArrayRecord()}),
    RecordDict({"failure": ConfigRecord({})}),
)


@pytest.mark.parametrize("content", NONSENSE)
def test_an_answer_that_cannot_be_read_fails_its_device_only(content: RecordDict) -> None:
    over = exchange(Babble(content, "train"), 2)
    assert trained(over, range(2)) == [TRAINED, FAILED]
    over = exchange(Babble(content, "query.probe"), 2)
    assert over.probe([fakes.probe_request(1)]) == [None]
    over = exchange(Babble(content, "evaluate"), 2)
    assert over.evaluate([fakes.evaluate_request(1)], lambda _: None) == [None]


def test_a_device_answers_for_itself_only() -> None:
    over = exchange(Babble(other(REPLY, "task", device=0), "train"), 2)
    replies = over.train([fakes.train_request(device) for device in range(2)], lambda _: None)
    assert [reply.device for reply in replies] == [0, 1]
    over = exchange(Babble(records.pack_evaluate_reply(EvaluateReply(0, 1, 0.5, 1.0)), "evaluate"), 2)
    assert over.evaluate([fakes.evaluate_request(1)], lambda _: None) == [EvaluateReply(1, 1, 0.5, 1.0)]


@pytest.mark.parametrize(
    "probe", [Probe(0.0, 1.0, 1.0, 1), Probe(1.0, np.nan, 1.0, 1), Probe(1.0, 1.0, -1.0, 1), Probe(1.0, 1.0, 1.0, -1)]
)
def test_a_probe_that_nobody_can_have_measured_is_none(probe: Probe) -> None:
    assert exchange(Babble(records.pack_probe(probe), "probe"), 2).probe([fakes.probe_request(1)]) == [None]


@pytest.mark.parametrize("reply", [EvaluateReply(1, 9, 1.5, 1.0), EvaluateReply(1, 9, 0.5, np.nan)])
def test_an_evaluation_that_nobody_can_have_measured_is_none(reply: EvaluateReply) -> None:
    over = exchange(Babble(records.pack_evaluate_reply(reply), "evaluate"), 2)
    assert over.evaluate([fakes.evaluate_request(1)], lambda _: None) == [None]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    base = tmp_path_factory.mktemp("real")
    keys = {**KEYS, "devices": 3, "sampled": 3, "rounds": 3, "probe": "never"}
    return RunConfig.from_values(
        {**keys, "model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}
    )


def served(config: RunConfig, directory: Path, train: Callable[[TrainRequest], TrainReply]) -> list[dict[str, Any]]:
    """The records of a run over real devices that train so."""
    app = make_client_app(train, at_work("probe"), at_work("evaluate_device"))
    run_federation(lambda over: run_server(config, over, directory), devices=config.devices, client_app=app)
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def test_a_run_goes_on_when_a_device_sends_nan(config: RunConfig, tmp_path: Path) -> None:
    def train(request: TrainRequest) -> TrainReply:
        reply = client_round.train(request)
        if request.device == 2:
            reply = replace(reply, arrays={name: array * np.nan for name, array in reply.arrays.items()})
        return reply

    for record in served(config, tmp_path / "run", train):
        assert [pull["report"]["outcome"] for pull in record["pulls"]] == [TRAINED, TRAINED, FAILED]
        assert record["pulls"][2]["report"]["message"].startswith("rejected: NaN or infinity in ")
        assert record["loss"] is None or np.isfinite(record["loss"])


OUT_OF_MEMORY_ERRORS = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY_ERRORS)
def test_out_of_memory_is_an_outcome_of_a_real_device_only(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: TrainRequest) -> None:
        raise error

    monkeypatch.setattr(client_round, "workbench", fail)
    report = client_round.train(fakes.train_request(0), own=True).report
    assert (report.outcome, report.message[:32]) == (OUT_OF_MEMORY, "ran out of memory while training")
    with pytest.raises(type(error)):  # in a simulation it is the memory of this machine
        client_round.train(fakes.train_request(0))


def test_a_device_that_ran_out_of_memory_gets_a_smaller_model(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LINK_VARIABLE, str(tmp_path / "link.json"))
    write_link(Link(0.1, 1e-6, 1e-6))
    least: dict[str, float] = {}

    def tuned(local: client_round.Local, *rest: Any) -> TrainReply:
        request, bench = local.request, rest[0]
        needed = bench.workload.planned_memory_bytes(request.action.pruning_ratio, request.action.lora_rank)
        if request.device == 1 and needed > least.setdefault("that failed", needed):
            raise AssertionError("it was given more")
        if request.device == 1 and needed > 0.9 * least["that failed"]:
            raise MemoryError
        return fitting(local, *rest)

    fitting = client_round.tuned
    monkeypatch.setattr(client_round, "tuned", tuned)
    measured = replace(config, cost="measured", target_sparsity=0.5, max_step_ratio=0.5, policy="fedspine")
    one, two, three = served(measured, tmp_path / "run", lambda request: client_round.train(request, own=True))
    assert [pull["report"]["outcome"] for pull in one["pulls"]] == [TRAINED, OUT_OF_MEMORY, TRAINED]
    assert one["pulls"][1]["report"]["message"].startswith("ran out of memory while training")
    assert one["pulls"][1]["report"]["compute_seconds"] > 0  # what the round lost by it
    assert [pull["report"]["outcome"] for record in (two, three) for pull in record["pulls"]] == [TRAINED] * 6


def test_a_model_that_does_not_fit_is_refused_before_training_with_the_estimate(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LINK_VARIABLE, str(tmp_path / "link.json"))
    write_link(Link(0.1, 1e-6, 1e-6))
    monkeypatch.setattr(MeasuredMeter, "memory_bytes", 1e4)
    monkeypatch.setattr(client_round, "tuned", lambda *_: pytest.fail("it trained"))
    expected = r"round 1: 0 of 3 devices finished.*out_of_memory: needs 0 MB of 0 MB"
    with pytest.raises(FederationError, match=expected):
        served(replace(config, cost="measured"), tmp_path / "run", lambda each: client_round.train(each, own=True))
