"""Flower's SuperLink, for which other machines are devices and nothing else: `python -m
fedspine.flower.guarded_superlink`, options as of `flower-superlink`.

A SuperLink answers devices and its operator at one port, and takes anybody who reaches it for the operator, who may
submit a run, which is code for every device, or register a device. Here only the SuperLink's own machine may do that.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flwr.supercore import constant, sql_mixin
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.corestate import sql_corestate
from flwr.superlink import main
from flwr.superlink.cli.flower_superlink import flower_superlink

FOR_DEVICES = "/v1/fleet/"
"""Where devices ask, and prove who they are."""
START_SECONDS = 120
"""That the run's process may need to start. Flower's 30 seconds are too few where much else is going on, and then it
starts another."""
LOCKED_MILLISECONDS = 60_000
"""That the database may be locked before a request fails, and with it what asked; Flower says 5 seconds."""

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[..., Awaitable[Any]], Callable[..., Awaitable[Any]]], Awaitable[None]]


def guarded(app: App) -> App:
    """The ASGI app, which answers other machines only what is for devices."""

    async def guard(scope: Scope, receive: Callable[..., Awaitable[Any]], send: Callable[..., Awaitable[Any]]) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(FOR_DEVICES) or _same_machine(scope):
            await app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"only from the machine of the SuperLink"})

    return guard


def _same_machine(scope: Scope) -> bool:
    """Whether a request comes from a loopback address, or from the very address that it went to."""
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    return ipaddress.ip_address(client[0]).is_loopback or bool(server and client[0] == server[0])


def _main() -> None:
    create = main.create_app

    def create_guarded(*arguments: Any, **options: Any) -> App:
        return guarded(create(*arguments, **options))

    vars(main)["create_app"] = create_guarded
    vars(sql_corestate)["HEARTBEAT_DEFAULT_INTERVAL"] = START_SECONDS
    vars(sql_mixin)["SQLITE_PRAGMAS"] = (*constant.SQLITE_PRAGMAS, ("busy_timeout", str(LOCKED_MILLISECONDS)))
    start_parent_process_monitor(os.getppid())  # a `fedspine serve` that was killed must not leave its run behind
    flower_superlink()


if __name__ == "__main__":
    _main()
