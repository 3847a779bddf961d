"""Flower's simulation runtime gives what the in-process grid gives, and leaves nothing behind."""

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from fedspine.errors import FederationError, ModelError
from fedspine.federation import Exchange
from fedspine.flower.client_app import make_client_app
from fedspine.flower.engines import run_federation
from fedspine.flower.exchange import GridExchange
from fedspine.flower.ray_engine import NODES_PER_WORKER
from fedspine.types import FAILED, TRAINED, TrainReply, TrainRequest
from tests.flower import fakes

pytestmark = pytest.mark.runtime


def train(request: TrainRequest) -> TrainReply:
    if request.action.lora_rank == 15:
        os._exit(1)
    return fakes.train(request)


APP = make_client_app(train, fakes.probe, fakes.evaluate)


def two_rounds(exchange: Exchange) -> Any:
    seen: list[int] = []
    replies = []
    for round in (1, 2):
        requests = [fakes.train_request(device, round, rank=13 if device == 2 else 8) for device in (5, 0, 2, 3)]
        replies += exchange.train(requests, lambda reply: seen.append(reply.device))
    probes = exchange.probe([fakes.probe_request(device) for device in range(6)])
    evaluations = exchange.evaluate([fakes.evaluate_request(device) for device in range(6)], lambda _: None)
    return fakes.flat([replies, probes, evaluations]), sorted(seen)


def leftovers() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("fs-*"))


def test_ray_equals_inline(capfd: pytest.CaptureFixture[str]) -> None:
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
        return fakes.flat(exchange.train(requests, lambda _: None)), len(list(exchange._grid.get_node_ids()))

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
