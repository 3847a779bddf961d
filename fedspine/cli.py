"""The command line: `fedspine COMMAND`, one file per command in `fedspine/commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fedspine import __version__
from fedspine.commands import (
    bench,
    calibrate,
    certificates,
    compare,
    export,
    health,
    join,
    keys,
    recommend,
    schedule,
    serve,
    simulate,
    study,
)
from fedspine.errors import FedSpineError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 1 when nothing can be recommended, 2 for a mistake that can be mended, 130 when
    interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.execute(options))
    except FedSpineError as error:
        print(f"fedspine: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedspine",
        description="Federated pruning and LoRA tuning of language models on weak, unequal devices.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=simulate.EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"fedspine {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    deployment = (certificates, serve, join, health)
    for command in (simulate, compare, study, recommend, export, bench, schedule, calibrate, *deployment, keys):
        command.add(commands)
    return parser
