"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_run_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="keys of the run")
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (see `fedspine keys`)"
    )
    parser.add_argument("--out", metavar="DIR", help=f"new directory of the run (default: runs/{name}-DATE-TIME)")
    parser.add_argument("--json", action="store_true", help="print only the summary, as JSON, on stdout")
