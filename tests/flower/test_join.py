"""A device of a real federation, without processes: its name, its own data, its clock, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import shutil
import socket
import ssl
import threading
import time
import tomllib
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.fab import Fab

from fedspine import client_round
from fedspine.certificates import make_certificates
from fedspine.cli import main
from fedspine.config import RunConfig
from fedspine.data.prepared import prepare
from fedspine.devices.measured import LINK_VARIABLE, Link, MeasuredMeter, read_link, write_link
from fedspine.errors import CheckpointError, ConfigError, DataError, FederationError, ModelError
from fedspine.federation import Exchange
from fedspine.flower import control, supernode, timed_supernode
from fedspine.flower.client_app import make_client_app
from fedspine.flower.control import Control
from fedspine.flower.engines import run_federation
from fedspine.flower.exchange import GridExchange
from fedspine.flower.inline import InlineGrid
from fedspine.flower.node import Node
from fedspine.flower.server_app import make_server_app
from fedspine.flower.superlink import local_address
from fedspine.flower.supernode import NOT_ACTIVATED, NOT_CONNECTED
from fedspine.health import last_answer_seconds, own_state
from fedspine.run_directory import DEVICES, resumed_config, write_names
from fedspine.simulation import run_server, simulate
from fedspine.structure import Structure
from fedspine.types import TRAINED, Action, ProbeRequest, TrainRequest
from fedspine.workbench import workbench
from tests.flower import fakes
from tests.small_run import KEYS, figures, rounds, write_data, write_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    base = tmp_path_factory.mktemp("join")
    model, data = write_model(base / "model"), write_data(base / "data")
    return RunConfig.from_values({**KEYS, "model": str(model), "data": str(data)})


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory, ["localhost"], ["a", "b"])
    return directory


# Names


def named(*names: str) -> InlineGrid:
    app: ClientApp = make_client_app(fakes.train, fakes.probe, fakes.evaluate)
    grid = InlineGrid(app, len(names))
    for context, name in zip(grid._contexts.values(), names, strict=True):
        context.node_config = {"name": name}
    return grid


def test_devices_are_numbered_in_the_order_of_their_names() -> None:
    grid = named("c", "a", "b")
    roster = GridExchange(grid, 3)._roster
    assert roster.connected() == dict(zip(grid._contexts, (2, 0, 1), strict=True))
    grid._contexts[4711] = grid._contexts.pop(next(iter(grid._contexts)))  # c is started again
    assert roster.connected()[4711] == 2
    grid._contexts[4711].node_config = {"name": "d"}
    roster._identities.pop(4711)
    with pytest.raises(FederationError, match="name = d: the run began with a, b, c"):
        roster.connected()


def test_a_name_that_is_used_twice_is_refused_before_training() -> None:
    with pytest.raises(FederationError, match="name = a: two SuperNodes have it; give each its own name"):
        GridExchange(named("a", "b", "a"), 3).probe([])


# What a device makes of the run's configuration


def test_a_device_follows_the_run_but_for_its_data_and_profile(config: RunConfig) -> None:
    settings = config.to_json()
    assert Node("a").settings(settings) == settings
    own = RunConfig.from_json(Node("a", "/rows.tsv", "ram-4g").settings(settings))
    assert own == replace(config, data="/rows.tsv", partition="all", population="ram-4g")
    distilling = replace(config, public_examples=8, distill_steps=5).to_json()
    assert RunConfig.from_json(Node("a", "/rows.tsv").settings(distilling)).public_examples == 0  # all rows are its own
    with pytest.raises(ConfigError, match="cost = 'virtual': all devices of a run need one kind of clock"):
        Node("a", device="measure").settings(settings)
    with pytest.raises(ConfigError, match="join with --device measure or without it"):
        Node("a", device="ram-4g").settings(replace(config, cost="measured").to_json())


def test_a_device_trains_on_all_its_own_rows_with_the_classes_of_the_server(config: RunConfig, tmp_path: Path) -> None:
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\n" + "good film\tgood\nbad film\tbad\n" * 10, encoding="utf-8")
    own = RunConfig.from_json(Node("a", str(rows)).settings(replace(config, classes=("bad", "good", "so")).to_json()))
    data = prepare(own)
    assert (data.classes, len(data.train) + len(data.test)) == (("bad", "good", "so"), 20)
    assert [len(each) for each in data.owned] == [18] * config.devices
    with pytest.raises(DataError, match="have the label 'good', which is not one of the run's 2 classes: bad, so"):
        prepare(replace(own, classes=("bad", "so")))


# The clock of a real device


def test_rates_come_from_large_transfers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link().downloaded(100_000, 2.0).downloaded(100, 0.5)
    assert link == Link(0.5, 2e-5, 2e-5)
    assert link.uploaded(100, 9.0) == link
    link = link.uploaded(50_000, 4.0)
    assert link == Link(0.5, 2e-5, 8e-5)
    monkeypatch.setenv(LINK_VARIABLE, str(tmp_path / "link.json"))
    write_link(link)
    assert read_link() == link
    meter = MeasuredMeter()
    assert (meter.download_seconds(7), meter.upload_seconds(1000)) == (0.5, 0.08)
    monkeypatch.delenv(LINK_VARIABLE)
    with pytest.raises(FederationError, match="cost = 'measured': this device does not time its transfers"):
        read_link()


def test_a_supernode_times_what_passes_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(answer: Any) -> Any:
        def work(*_: Any) -> Any:
            time.sleep(0.02)
            return answer

        return work

    @contextmanager
    def connection(*_: Any) -> Iterator[tuple[Any, ...]]:
        fab = type("Fab", (), {"content": bytes(40_000)})
        pulled = bytes(30_000)
        yield 7, slow(None), slow(None), slow(None), slow(fab), slow(pulled), slow(None), slow(None)

    monkeypatch.setattr(timed_supernode, "http_request_response", connection)
    monkeypatch.setenv(LINK_VARIABLE, str(tmp_path / "link.json"))
    with timed_supernode.timed_connection() as parts:
        _, receive, send, _, get_fab, pull, push, confirm = parts
        for _ in range(2):
            receive()
            get_fab("hash", 1)
            pull(1, "x"), pull(1, "y")
            confirm(1, "message")
            link = read_link()
            assert last_answer_seconds(tmp_path) < 5
            assert 0.04 <= link.download_seconds < 0.06
            assert 0.04 / 60_000 <= link.download_seconds_per_byte < 0.06 / 60_000
            time.sleep(0.1)  # the process that trains
            send("message")
            push(1, "session", "x", bytes(100_000))
    assert 0.04 / 100_000 <= link.upload_seconds_per_byte < 0.06 / 100_000


def test_a_full_disk_costs_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def connection(*_: Any) -> Iterator[tuple[Any, ...]]:
        yield 7, *(lambda *_: b"" for _ in range(7))

    monkeypatch.setattr(timed_supernode, "http_request_response", connection)
    monkeypatch.setattr(timed_supernode, "log", logging.getLogger("notes").log)
    (tmp_path / "full").touch()  # no folder, so nothing can be written there
    monkeypatch.setenv(LINK_VARIABLE, str(tmp_path / "full" / "link.json"))
    with timed_supernode.timed_connection() as (_, receive, _, _, _, pull, push, confirm):
        for _ in range(2):
            receive(), pull(1, "x"), confirm(1, "message"), push(1, "session", "x", b"")
    assert len(caplog.records) == 2  # one for each file


def test_a_measured_round_fills_the_same_fields(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LINK_VARIABLE, str(tmp_path / "link.json"))
    write_link(Link(0.25, 1e-6, 2e-6))
    settings = replace(config, cost="measured").to_json()
    bench = workbench(settings)
    full = Structure.full(bench.shape)
    began = time.perf_counter()
    probe = client_round.probe(ProbeRequest(1, 0, full, 8, settings))
    request = TrainRequest(1, 0, Action(0.0, 16), full, bench.start, None, settings)
    report = client_round.train(request).report
    passed = time.perf_counter() - began
    assert 0 < probe.seconds_per_flop * bench.workload.iteration_flops(full.counts(), 8) < probe.seconds < passed
    assert (probe.seconds_per_byte, probe.bytes) == (1.5e-6, 0)
    assert report.outcome == TRAINED
    assert 0 < report.compute_seconds < passed
    assert (report.download_seconds, report.upload_seconds) == (0.25, report.upload_bytes * 2e-6)
    assert report.peak_memory_bytes > 50e6  # of a process that has torch


# Joining, and joining again

ACCEPTED, UNSIGNED = (0, True, ""), (0, False, "")
REFUSED, LATE = (1, False, f"{NOT_CONNECTED}\n{NOT_ACTIVATED}"), (1, False, f"{NOT_CONNECTED}\nhandshake timed out")
End = tuple[int, bool, str]


def joined(monkeypatch: pytest.MonkeyPatch, state: Path, ends: list[End], seconds: float) -> tuple[int, str]:
    """How many SuperNodes there are when they end so, each after these seconds; and the error, if that ends `join`."""
    clock, left = [1000.0], list(ends)

    def run(command: Any, environment: Any, said: deque[str], joined: Path, tell: Any) -> tuple[int, bool]:
        if not left:
            raise KeyboardInterrupt
        clock[0] += seconds
        status, accepted, text = left.pop(0)
        said.clear()
        said.append(text)
        if accepted:
            joined.touch()
        return status, accepted

    monkeypatch.setattr(supernode, "_run_supernode", run)
    monkeypatch.setattr(supernode, "_check_server", lambda _: None)
    monkeypatch.setattr(supernode, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: None))
    try:
        supernode.join(supernode.Device("10.0.0.1:9092", "a", state), lambda _: None)
    except KeyboardInterrupt:
        return len(ends), ""
    except FederationError as error:
        return len(ends) - len(left), str(error)
    raise AssertionError


def test_a_device_that_was_accepted_joins_again_without_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seconds in (1, 1000):
        ends = [ACCEPTED, REFUSED, ACCEPTED, LATE, LATE, REFUSED, LATE, ACCEPTED]
        assert joined(monkeypatch, tmp_path / "state", ends, seconds) == (8, "")


@pytest.mark.parametrize(
    ("end", "words"), [(REFUSED, "it does not know the key"), (UNSIGNED, "this machine's clock is off")]
)
def test_a_device_that_is_refused_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: End, words: str
) -> None:
    tried, error = joined(monkeypatch, tmp_path / "never", [end] * 9, 10)
    assert (tried, words in error) == (1, True), error
    tried, error = joined(monkeypatch, tmp_path / "before", [ACCEPTED, *[end] * 9], 10)
    assert (tried, words in error) == (7, True), error  # for 45 s it may be held for connected
    with own_state(tmp_path / "taken"):
        tried, error = joined(monkeypatch, tmp_path / "taken", [end], 10)
        assert (tried, "taken: another `fedspine serve` or `join`" in error) == (0, True), error
    tried, error = joined(monkeypatch, tmp_path / "late", [LATE], 10)
    assert (tried, "handshake timed out" in error) == (1, True), error


# What is refused before anything starts


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("fedspine: error: ")
    assert words in err


def test_join_says_what_is_wrong(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
    Path("empty.tsv").touch()
    Path("a.key").write_text("no key")
    Path("ca.crt").write_text("no certificate")
    Path("b.key").write_bytes((certificates / "b.key").read_bytes())
    secure = ["--certificates", str(certificates)]
    for name, server, more, words in (
        ("a b", nobody, secure, "name 'a b': must be letters"),
        ("c", nobody, secure, "it holds no c.key; copy it from where"),
        ("a", nobody, ["--certificates", "."], "a.key: no private key"),
        ("b", nobody, ["--certificates", "."], "ca.crt: no certificate"),
        ("a", nobody, [*secure, "--data", "absent.tsv"], "--data absent.tsv: there is no such file or folder"),
        ("a", nobody, [*secure, "--data", "empty.tsv"], "--data empty.tsv: it is empty"),
        ("a", nobody, [*secure, "--device", "phone"], "population = 'phone': neither a file nor"),
        ("a", "here", secure, "--server here: must be HOST:PORT"),
        ("a", nobody, secure, "cannot be reached ([Errno 111] Connection refused); start `fedspine serve`"),
    ):
        refused(capsys, ["join", "--server", server, "--name", name, "--state", "state", *more], words)
    assert not Path("state").exists()


@contextmanager
def listening(directory: Path | None) -> Iterator[str]:
    """A server that shakes hands once, by TLS or in plain text."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            try:
                if directory:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(directory / "server.crt", directory / "server.key")
                    context.wrap_socket(connection, server_side=True).close()
                else:
                    connection.recv(10)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.close()
            except OSError:
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_another_server_is_not_joined(certificates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_certificates(tmp_path / "other", ["localhost"], ["a"])
    joining = ["--name", "a", "--certificates", str(certificates), "--state", str(tmp_path / "state")]
    with listening(tmp_path / "other") as server:
        refused(capsys, ["join", "--server", server, *joining], "its certificate is not accepted")
    with listening(None) as server:
        refused(capsys, ["join", "--server", server, *joining], "it does not speak TLS")
    plain = ["--name", "a", "--insecure", "--state", str(tmp_path / "state")]
    with listening(tmp_path / "other") as server:
        refused(capsys, ["join", "--server", server, *plain], "it speaks TLS only; join with --certificates")


def test_serve_says_what_is_wrong(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    secure = ["--certificates", str(certificates)]
    two = ["-s", "devices=2", "-s", "sampled=2"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = ["--host", "127.0.0.1", "--port", str(taken.getsockname()[1])]
        refused(capsys, ["serve", *secure, *two, *port], "cannot listen there")
    refused(capsys, ["serve", *secure], "devices = 80: ")
    refused(capsys, ["serve", "--certificates", "absent", *two], "it holds no public key of a device")
    refused(capsys, ["serve", *secure, *two, "-s", "close_at=0.5"], "close_at = 0.5: a deployment waits")
    refused(capsys, ["serve", *secure, *two, "-s", "cost=measured", "-s", "policy=clairvoyant"], "nobody knows")
    refused(capsys, ["serve", *secure, *two, "--port", "99999"], "cannot listen there")
    refused(capsys, ["serve", *secure, *two, "--wait-for", "3"], "--wait-for 3: must be from 1 to devices = 2")
    refused(capsys, ["serve", "--insecure", *two, "--wait-for", "1"], "needs --certificates, whose keys name")
    with own_state(tmp_path / "taken"):
        place = ["--host", "127.0.0.1", "--port", "0", "--state", "taken"]
        refused(capsys, ["serve", "--insecure", *two, *place], "--state taken: another `fedspine serve`")
    shutil.rmtree("taken")
    refused(capsys, ["simulate", "-s", "deadline_seconds=30"], "deadline_seconds = 30: simulated devices are not")
    refused(capsys, ["simulate", "-s", "cost=measured"], "simulated devices have no clock but the virtual one")
    refused(capsys, ["schedule", "-s", "cost=measured"], "simulated devices have no clock but the virtual one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "127.0.0.1:9"), ("::", "[::1]:9"), ("fd00::7", "[fd00::7]:9"), ("server", "server:9")],
)
def test_the_server_is_asked_where_it_listens(host: str, address: str) -> None:
    assert local_address(host, 9) == address
    Control(address, None, lambda: None).close()


def test_the_apps_of_the_checkout_are_those_of_the_bundle() -> None:
    from fedspine.flower.bundle import COMPONENT

    root = Path(__file__).resolve().parents[2]
    for side, name in (("server", "server_app"), ("clients", "client_app")):
        text = (root / side / "app.py").read_text(encoding="utf-8")
        assert text.partition("\n\n")[2] == COMPONENT.format(name=name)


def settings_of(fab: Fab) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(fab.content)) as archive:
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    values: dict[str, Any] = project["tool"]["flwr"]["app"]["config"]
    return values


def test_the_bundle_holds_the_package_and_the_configuration(tmp_path: Path) -> None:
    from fedspine.flower.bundle import bundle

    config = RunConfig(classes=("a", "b"), rounds=3)
    fab = bundle(config, tmp_path, resume=False)
    with zipfile.ZipFile(io.BytesIO(fab.content)) as archive:
        files = set(archive.namelist())
    values = settings_of(fab)
    assert {"fedspine/federation.py", "server/app.py", "clients/app.py"} <= files
    assert (values.pop("directory"), values.pop("resume")) == (str(tmp_path), False)
    assert RunConfig.from_values(values) == config
    assert json.dumps(values)


def test_the_server_of_a_deployment_knows_the_key_of_a_node() -> None:
    from fedspine.flower.bundle import bundle

    fab = bundle(RunConfig(devices=2, sampled=2), Path("run"), False, ("a", "b"), 1, {"a": 2**63 + 1, "b": 7})
    seen: list[Any] = []
    app = make_server_app(lambda _, exchange, **where: seen.append(exchange._roster))
    app(InlineGrid(named("a")._client_app, 2), Context(1, 1, {}, RecordDict(), settings_of(fab)))
    assert (seen[0]._numbers, seen[0]._owners) == ({"a": 0, "b": 1}, {2**63 + 1: "a", 7: "b"})


def test_a_run_that_goes_on_keeps_the_numbers_of_its_devices(tmp_path: Path) -> None:
    GridExchange(named("c", "b"), 2, directory=tmp_path).probe([])
    assert GridExchange(named("c", "b"), 2, directory=tmp_path)._roster._numbers == {"b": 0, "c": 1}
    with pytest.raises(FederationError, match="name = a: the run began with b, c; join as one of them"):
        GridExchange(named("a", "b"), 2, directory=tmp_path).probe([])
    with pytest.raises(
        CheckpointError, match="began with the devices b, c; missing now: c; new: a; let --certificates"
    ):
        GridExchange(named("a", "b"), 2, names=("a", "b"), directory=tmp_path)
    (tmp_path / DEVICES).write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GridExchange(named("a", "b"), 2, directory=tmp_path)


def test_serve_refuses_to_go_on_with_other_devices(
    certificates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_bytes(RunConfig(devices=2, sampled=2).to_toml().encode())
    write_names(run, ["b", "c"])
    place = ["--certificates", str(certificates), "--state", str(tmp_path / "state")]
    refused(capsys, ["serve", "--resume", str(run), *place], "began with the devices b, c; missing now: c; new: a;")


def test_the_server_of_a_deployment_continues_a_run(config: RunConfig, tmp_path: Path) -> None:
    def served(config: RunConfig, resume: bool) -> None:
        def run(exchange: Exchange) -> None:
            run_server(config, Impatient(exchange, 99 if resume else 4), tmp_path / "run", resume)

        run_federation(run, devices=config.devices)

    with pytest.raises(KeyboardInterrupt):
        served(config, resume=False)
    assert len(rounds(tmp_path / "run")) == 3
    served(resumed_config(tmp_path / "run"), resume=True)
    whole = simulate(config, out=tmp_path / "whole").directory
    assert rounds(tmp_path / "run") == rounds(whole)
    assert figures(tmp_path / "run") == figures(whole)


class Impatient:
    """An exchange that is interrupted in a round."""

    def __init__(self, exchange: Exchange, rounds: int) -> None:
        self.attendance, self.probe, self.evaluate = exchange.attendance, exchange.probe, exchange.evaluate
        self._exchange, self._left = exchange, rounds

    def train(self, *arguments: Any) -> Any:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        return self._exchange.train(*arguments)


@pytest.mark.parametrize(
    ("path", "client", "status"),
    [
        ("/v1/fleet/pull-messages", "10.0.0.7", 200),
        ("/v1/control/start-run", "10.0.0.7", 403),
        ("/v1/runtime/acquire-task", "10.0.0.7", 403),
        ("/v1/control/start-run", "127.0.0.1", 200),
        ("/v1/control/start-run", "10.0.0.1", 200),  # the server's own address
    ],
)
def test_other_machines_are_devices_only(path: str, client: str, status: int) -> None:
    from fedspine.flower.guarded_superlink import guarded

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": "http", "path": path, "client": (client, 5), "server": ("10.0.0.1", 9092)}
    asyncio.run(guarded(app)(scope, receive, send))
    assert sent[0]["status"] == status


@pytest.mark.parametrize(("parts", "status"), [(20, 200), (21, 413), (10**9, 413)])
def test_a_request_without_end_is_not_read(parts: int, status: int) -> None:
    from fedspine.flower.guarded_superlink import LONGEST_BODY, guarded

    part, sent, read = bytes(LONGEST_BODY // 20), list[Any](), list[bytes]()
    left = parts

    async def receive() -> Any:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": part, "more_body": left > 0}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            read.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200})

    scope = {"type": "http", "path": "/v1/fleet/push-object", "client": ("10.0.0.7", 5), "server": ("10.0.0.1", 9092)}
    asyncio.run(guarded(app)(scope, receive, send))
    assert sent[0]["status"] == status
    assert len(read) == (parts if status == 200 else 0)


class Stalled:
    """A SuperLink's interface whose first answers are late, or errors of the server."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def ListNodes(self, request: ListNodesRequest) -> ListNodesResponse:
        if self.errors:
            raise self.errors.pop(0)
        return ListNodesResponse(nodes_info=[NodeInfo(node_id=7, status="online", name="a")])


def test_a_slow_answer_of_the_superlink_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "AGAIN_SECONDS", 0.0)
    question = httpx.Request("POST", "http://127.0.0.1")
    locked = httpx.HTTPStatusError("locked", request=question, response=httpx.Response(500, request=question))
    refusal = httpx.HTTPStatusError("no", request=question, response=httpx.Response(403, request=question))
    ended: list[FederationError] = []

    def check_alive() -> None:
        if ended:
            raise ended[0]

    def online(*errors: Exception) -> list[str]:
        with closing(control.Control("127.0.0.1:1", None, check_alive)) as asked:
            monkeypatch.setattr(asked, "_client", Stalled([*errors]))
            return asked.online()

    monkeypatch.setattr(Stalled, "close", lambda _: None, raising=False)
    assert online(httpx.ReadTimeout("slow"), locked, httpx.ReadError("cut")) == ["a"]
    with pytest.raises(FederationError, match="the SuperLink refused: no"):
        online(refusal)
    ended.append(FederationError("the SuperLink ended"))
    with pytest.raises(FederationError, match="the SuperLink ended"):
        online(httpx.ReadTimeout("slow"))
    ended.clear()
    monkeypatch.setattr(control, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(FederationError, match="does not answer any more: slow"):
        online(httpx.ReadTimeout("slow"))


def test_a_question_waits_longer_than_the_database() -> None:
    from fedspine.flower.guarded_superlink import LOCKED_MILLISECONDS

    with closing(control.Control("127.0.0.1:1", None, lambda: None)) as asked:
        assert (asked._client._client.timeout.read or 0) * 1000 > LOCKED_MILLISECONDS


def test_a_mistake_on_a_device_is_told_with_its_name() -> None:
    exchange = GridExchange(named("a", "b"), 2)
    with pytest.raises(ModelError, match=f"device b: {fakes.USER_MISTAKE}"):
        exchange.train([fakes.train_request(1, rank=14)], lambda _: None)
