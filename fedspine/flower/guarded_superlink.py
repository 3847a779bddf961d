"""Flower's SuperLink, for which other machines are devices and nothing else: `python -m
fedspine.flower.guarded_superlink`, options as of `flower-superlink`.

A SuperLink answers devices and its operator at one port, and takes anybody who reaches it for the operator, who may
submit a run, which is code for every device, or register a device. Here only the SuperLink's own machine may do that.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flwr.superlink import main
from flwr.superlink.cli.flower_superlink import flower_superlink

FOR_DEVICES = "/v1/fleet/"
"""Where devices ask, and prove who they are."""

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
    flower_superlink()


if __name__ == "__main__":
    _main()
