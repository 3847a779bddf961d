"""The Flower `ServerApp` of a deployment: run configuration of `flwr run` in, a run over its grid out."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedspine.config import RunConfig
from fedspine.flower.exchange import GridExchange

WHERE = ("directory", "resume")
"""What `fedspine serve` adds to the keys of the run."""


def make_server_app(
    run: Callable[..., None],
    *,
    connect_seconds: float = 600.0,
    timeout_seconds: float | None = None,
) -> ServerApp:
    """The app of the coordinating machine. `run(config, exchange)` has `directory` and `resume` too if they are set.

    `connect_seconds`: how long all devices have to join; `timeout_seconds`: how long a device has to reply.
    Errors: `ConfigError` for a wrong run configuration, `FederationError` when devices do not join.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # Flower lets a user override only keys that the project lists; one that is listed as "" is not set.
        values = {key: value for key, value in context.run_config.items() if value != ""}
        where = {key: values.pop(key) for key in WHERE if key in values}
        config = RunConfig.from_values(values)
        run(
            config,
            GridExchange(grid, config.devices, connect_seconds=connect_seconds, timeout_seconds=timeout_seconds),
            **where,
        )

    return app
