"""The two apps of a deployment, as `flwr run` and `fedspine serve` start them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedspine.config import RunConfig
from fedspine.flower.client_app import at_work, make_client_app
from fedspine.flower.server_app import make_server_app
from fedspine.importing import load

if TYPE_CHECKING:
    from fedspine.exchange import Exchange


def _serve(config: RunConfig, exchange: Exchange, **where: Any) -> None:
    load("fedspine.simulation").run_server(config, exchange, **where)


# The process of a message serves one device (`own`): it keeps only what that one has not cut.
client_app = make_client_app(at_work("train", own=True), at_work("probe"), at_work("evaluate_device", own=True))
server_app = make_server_app(_serve)
