"""Flower's SuperLink, for which other machines are devices and nothing else: `python -m
fedspine.flower.guarded_superlink`, options as of `flower-superlink`.

A SuperLink answers devices and its operator at one port, and takes anybody who reaches it for the operator, who may
submit a run, which is code for every device, or register a device. Here only the SuperLink's own machine may do that.
It also reads a request before it asks who sends it. Here no request may be longer than those that Flower makes.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flwr.common.constant import FAB_MAX_SIZE, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
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
LONGEST_BODY = 2 * max(FAB_MAX_SIZE, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)
"""Bytes of a request: Flower divides arrays into chunks of 5 MB, and an app has 10 MB at most."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def guarded(app: App) -> App:
    """The ASGI app, which answers other machines only what is for devices, and reads no endless requests."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        elif not (scope["path"].startswith(FOR_DEVICES) or _same_machine(scope)):
            await _refuse(send, 403, "only from the machine of the SuperLink")
        elif (parts := await _body(receive)) is None:
            await _refuse(send, 413, f"a request has {LONGEST_BODY} bytes at most")
        else:

            async def again() -> MutableMapping[str, Any]:
                return parts.pop(0) if parts else await receive()

            await app(scope, again, send)

    return guard


async def _body(receive: Receive) -> list[MutableMapping[str, Any]] | None:
    """The parts of a request's body, or None when it is too long."""
    parts, size, more = [], 0, True
    while more:
        part = await receive()
        parts.append(part)
        size += len(part.get("body", b""))
        if size > LONGEST_BODY:
            return None
        more = part.get("more_body", False)
    return parts


async def _refuse(send: Send, status: int, why: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": why.encode()})


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
