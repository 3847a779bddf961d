"""`fedspine keys`."""

from __future__ import annotations

import argparse
import dataclasses

from fedspine.commands.arguments import Subparsers
from fedspine.config import RunConfig
from fedspine.config_key import Key
from fedspine.methods import SOURCES


def add(commands: Subparsers) -> None:
    keys = commands.add_parser("keys", help="list every configuration key", description="Every configuration key.")
    keys.set_defaults(execute=run)


def run(_: argparse.Namespace) -> int:
    for field in dataclasses.fields(RunConfig):
        key: Key = field.metadata["key"]
        bounds = " | ".join(("true", "false") if isinstance(field.default, bool) else key.choices)
        if not bounds and (key.minimum is not None or key.maximum is not None):
            low = "" if key.minimum is None else f"{key.minimum:g} <= "
            high = "" if key.maximum is None else f" <= {key.maximum:g}"
            bounds = f"{low}value{high}"
        default = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        print(f"{field.name} = {default.lower() if isinstance(field.default, bool) else default}")
        print(f"    {key.help}{f'  [{bounds}]' if bounds else ''}")
        if field.name == "method":
            for method, source in SOURCES.items():
                print(f"        {method}: {source}")
    return 0
