"""The two apps of a deployment, as `flwr run` and `fedspine serve` start them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedspine.config import RunConfig
from fedspine.flower.client_app import make_client_app
from fedspine.flower.server_app import make_server_app
from fedspine.types import EvaluateReply, EvaluateRequest, Probe, ProbeRequest, TrainReply, TrainRequest

if TYPE_CHECKING:
    from fedspine.federation import Exchange

# Model and training take seconds to import, and a device loads them anew for every message: only when there is work.


def _train(request: TrainRequest) -> TrainReply:
    from fedspine.client_round import train

    return train(request, own=True)  # the process serves one device: it keeps only what that one has not cut


def _probe(request: ProbeRequest) -> Probe:
    from fedspine.client_round import probe

    return probe(request)


def _evaluate(request: EvaluateRequest) -> EvaluateReply:
    from fedspine.client_round import evaluate_device

    return evaluate_device(request, own=True)


def _serve(config: RunConfig, exchange: Exchange, **where: Any) -> None:
    from fedspine.simulation import run_server

    run_server(config, exchange, **where)


client_app = make_client_app(_train, _probe, _evaluate)
server_app = make_server_app(_serve)
