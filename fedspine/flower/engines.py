"""`run_federation`: the same server code and the same `ClientApp` on either engine.

`inline` calls the app in this process, one device after the other: no start-up, and the easiest to debug. `ray` is
Flower's simulation runtime with worker processes. Both give the same result, bit for bit. `grouped` trains the devices
of a round as one batch, for processors that are idle otherwise; its result is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedspine.errors import ConfigError
from fedspine.flower.client_app import at_work, make_client_app
from fedspine.flower.cluster import Cluster, check_address
from fedspine.flower.exchange import GridExchange
from fedspine.flower.inline import RUN_ID, InlineGrid
from fedspine.importing import load

if TYPE_CHECKING:
    from fedspine.exchange import Exchange

T = TypeVar("T")
ENGINES = ("inline", "grouped", "ray")
GROUP_SIZE = 32
"""Devices that share a batch of the grouped engine."""


def run_federation(
    run: Callable[[Exchange], T],
    *,
    devices: int,
    engine: str = "inline",
    workers: int = 1,
    threads: int = 1,
    cluster: Cluster | None = None,
    client_app: ClientApp | None = None,
) -> T:
    """Run `run` as the server of a simulated federation and return its result.

    `workers`: processes of the ray engine, one device each at a time; `threads`: torch threads of each; `cluster`: a
    Ray cluster (`find_cluster`) that has the workers, as many as it was divided for.
    `client_app`: by default the app around `fedspine.client_round`. What `run` raises comes out as it is, and so does
    an interruption from the keyboard.

    Errors: `ConfigError` for an unknown engine or number of workers, `FederationError` when Ray does not start.
    """
    app = client_app or default_client_app()
    check_engine(engine, workers)
    if engine == "inline":
        return _run_inline(run, InlineGrid(app, devices), devices)
    if engine == "grouped":
        from fedspine.group_round import train_group

        return _run_inline(run, InlineGrid(app, devices, train_group, GROUP_SIZE), devices)
    # Ray takes seconds to import, and only this engine needs it.
    run_with_ray = load("fedspine.flower.ray_engine").run_with_ray
    return cast("T", run_with_ray(run, app, devices, workers, threads, cluster))


def check_engine(engine: str, workers: int | None, address: str | None = None) -> None:
    """Errors: `ConfigError` for an unknown engine or number of workers, or an address that is none or of no use."""
    if engine not in ENGINES:
        raise ConfigError(f"engine = {engine!r}: must be one of auto, {', '.join(ENGINES)}")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers = {workers}: must be at least 1")
    if address is not None:
        check_address(address)
        if engine != "ray":
            raise ConfigError(
                f"address = {address!r}: engine = {engine!r} has no use for a Ray cluster; leave address out, or take "
                "engine = 'ray'"
            )


def default_client_app() -> ClientApp:
    """The app around `fedspine.client_round`."""
    return make_client_app(at_work("train"), at_work("probe"), at_work("evaluate_device"))


def _run_inline(run: Callable[[Exchange], T], inline: InlineGrid, devices: int) -> T:
    results: list[T] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(run(GridExchange(grid, devices)))

    context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server_app(inline, context)
    return results[0]
