"""Flower's simulation runtime gives what the in-process grid gives, and leaves nothing behind."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedspine.errors import ConfigError, FederationError, ModelError
from fedspine.federation import Exchange
from fedspine.flower.client_app import make_client_app
from fedspine.flower.cluster import find_cluster
from fedspine.flower.engines import run_federation
from fedspine.flower.exchange import GridExchange
from fedspine.flower.ray_engine import NODES_PER_WORKER
from fedspine.types import FAILED, TRAINED, Probe, ProbeRequest, TrainReply, TrainRequest
from tests.flower import fakes

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).resolve().parents[2]
WHERE = 12
"""The rank of a probe that tells where it ran."""


def train(request: TrainRequest) -> TrainReply:
    if request.action.lora_rank == 15:
        os._exit(1)
    return fakes.train(request)


def probe(request: ProbeRequest) -> Probe:
    if request.lora_rank != WHERE:
        return fakes.probe(request)
    import ray

    time.sleep(0.3)  # so that one worker cannot answer all
    node = int(ray.get_runtime_context().get_node_id()[:8], 16)
    return Probe(float(os.environ["OMP_NUM_THREADS"]), 1e-9, 0.1, node)


APP = make_client_app(train, probe, fakes.evaluate)


def two_rounds(exchange: Exchange) -> Any:
    seen: list[int] = []
    replies = []
    for round in (1, 2):
        requests = [fakes.train_request(device, round, rank=13 if device == 2 else 8) for device in (5, 0, 2, 3)]
        replies += exchange.train(requests, lambda reply: seen.append(reply.device))
    probes = exchange.probe([fakes.probe_request(device) for device in range(6)])
    evaluations = exchange.evaluate([fakes.evaluate_request(device) for device in range(6)], lambda _: None)
    return fakes.flat([replies, probes, evaluations]), sorted(seen)


@pytest.fixture
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where no other run of this machine leaves anything. Short: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


def leftovers() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("fs-*"))


def test_ray_equals_inline(capfd: pytest.CaptureFixture[str], own_temporary_folder: None) -> None:
    environment, before = dict(os.environ), leftovers()
    inline = run_federation(two_rounds, devices=6, engine="inline", client_app=APP)
    ray = run_federation(two_rounds, devices=6, engine="ray", workers=2, client_app=APP)
    assert ray == inline
    assert (capfd.readouterr().out, leftovers()) == ("", before)
    changed = {name for name in os.environ if os.environ[name] != environment.get(name)}
    assert all(name.startswith("RAY_") for name in changed)  # importing Ray sets some of its own


def test_a_few_nodes_stand_in_for_many_devices() -> None:
    def run(exchange: Exchange) -> Any:
        requests = [fakes.train_request(device) for device in range(0, 500, 9)]
        assert isinstance(exchange, GridExchange)
        return fakes.flat(exchange.train(requests, lambda _: None)), len(list(exchange._mail.grid.get_node_ids()))

    ray, nodes = run_federation(run, devices=500, engine="ray", client_app=APP)
    inline, _ = run_federation(run, devices=500, engine="inline", client_app=APP)
    assert ray == inline
    assert nodes == NODES_PER_WORKER


def test_a_dead_worker_is_a_failed_reply_and_is_replaced() -> None:
    def run(exchange: Exchange) -> None:
        (dead,) = exchange.train([fakes.train_request(0, rank=15)], lambda _: None)
        assert dead.report.outcome == FAILED
        assert "ActorUnavailable" in dead.report.message or "ActorDied" in dead.report.message
        deadline = time.monotonic() + 30
        while exchange.train([fakes.train_request(1)], lambda _: None)[0].report.outcome != TRAINED:
            assert time.monotonic() < deadline

    run_federation(run, devices=2, engine="ray", workers=1, client_app=APP)


def test_an_error_comes_out_unchanged_also_in_a_notebook() -> None:
    async def cell() -> None:  # a notebook runs its cells inside an event loop
        requests = [fakes.train_request(device, rank=14) for device in range(2)]
        run_federation(lambda e: e.train(requests, lambda _: None), devices=2, engine="ray", client_app=APP)

    with pytest.raises(ModelError, match=fakes.USER_MISTAKE):
        asyncio.run(cell())


def test_a_runtime_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedspine.flower import ray_engine

    monkeypatch.setattr(ray_engine, "OBJECT_STORE_BYTES", 1)
    with pytest.raises(
        FederationError, match=r"simulation runtime stopped: ValueError: .* engine = 'inline' needs no Ray"
    ):
        run_federation(lambda e: e.probe([fakes.probe_request(0)]), devices=1, engine="ray", client_app=APP)


@pytest.fixture(scope="module")
def two_machines() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with a CPU each, both on this machine."""
    directory = tempfile.mkdtemp(prefix="two-", dir="/tmp")  # short, for Ray's sockets
    head, client, *agents = free_ports(4)
    address = f"127.0.0.1:{head}"
    first = [
        f"--port={head}",
        f"--ray-client-server-port={client}",
        f"--temp-dir={directory}/ray",
        "--include-dashboard=0",
    ]
    nodes = []
    try:
        for role, agent in zip((["--head", *first], [f"--address={address}"]), agents, strict=True):
            nodes.append(started([*role, f"--dashboard-agent-listen-port={agent}"], directory))
        yield address
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
            node.wait(timeout=30)
        shutil.rmtree(directory, ignore_errors=True)


def started(options: list[str], directory: str) -> subprocess.Popen[str]:
    """`ray start`, when it says that the node is up. With --block it ends with all processes of its node."""
    common = ["--block", "--num-cpus=1", "--num-gpus=0", "--object-store-memory=100000000"]
    node = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", *options, *common],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert node.stdout is not None
    said = []
    for line in node.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            return node
    raise AssertionError("".join(said))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def test_a_cluster_equals_inline_works_on_every_node_and_stays_up(two_machines: str) -> None:
    def run(exchange: Exchange) -> Any:
        import ray

        result = two_rounds(exchange)
        probes = exchange.probe([fakes.probe_request(device, rank=WHERE) for device in range(6)])
        assert {probe.seconds_per_flop for probe in probes} == {3.0}
        assert {probe.bytes for probe in probes} == {int(node["NodeID"][:8], 16) for node in ray.nodes()}
        return result

    inline = run_federation(two_rounds, devices=6, client_app=APP)
    for _ in range(2):
        cluster = find_cluster(two_machines, workers=None, cuda=False)
        assert cluster.division.workers == 2
        on_cluster = run_federation(run, devices=6, engine="ray", threads=3, cluster=cluster, client_app=APP)
        assert on_cluster == inline


def test_a_cluster_that_does_not_fit_says_why(two_machines: str) -> None:
    with pytest.raises(ConfigError, match="set workers to at least 2"):
        find_cluster(two_machines, workers=1, cuda=False)
    with pytest.raises(FederationError, match="no machine of this cluster has CPUs and GPUs"):
        find_cluster(two_machines, workers=None, cuda=True)
