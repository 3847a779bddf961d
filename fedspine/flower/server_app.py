"""The Flower `ServerApp` of a deployment: run configuration of `flwr run` in, a run over its grid out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedspine.config import RunConfig
from fedspine.flower.exchange import GridExchange
from fedspine.processes import end_with_parent

WHERE = ("directory", "resume")
WHO = ("names", "least", "nodes")
"""What `fedspine serve` adds to the keys of the run: for its files, and of its devices."""


def make_server_app(
    run: Callable[..., None],
    *,
    connect_seconds: float = 600.0,
) -> ServerApp:
    """The app of the coordinating machine. `run(config, exchange)` has `directory` and `resume` too if they are set.

    `connect_seconds`: how long devices have to join, at the start and when too few for a round are left.
    Errors: `ConfigError` for a wrong run configuration, `FederationError` when devices do not join.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # Flower lets a user override only keys that the project lists; one that is listed as "" is not set.
        values = {key: value for key, value in context.run_config.items() if value != ""}
        where, who = ({key: values.pop(key) for key in keys if key in values} for keys in (WHERE, WHO))
        if "directory" in where:  # `fedspine serve`, which another may have taken the place of
            end_with_parent()
        config = RunConfig.from_values(values)
        exchange = GridExchange(
            grid,
            config.devices,
            timeout_seconds=config.deadline_seconds or None,
            connect_seconds=connect_seconds,
            real=True,
            least=int(who.get("least", config.devices)),
            names=str(who["names"]).split(",") if "names" in who else (),
            nodes=json.loads(str(who.get("nodes", "{}"))),
            directory=Path(str(where["directory"])) if "directory" in where else None,
        )
        run(config, exchange, **where)

    return app
