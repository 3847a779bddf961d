"""`fedspine health`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedspine.commands.arguments import Subparsers
from fedspine.errors import FederationError

EXAMPLES = """examples:
  fedspine health superlink              on the server: does the SuperLink answer?
  fedspine health ~/.fedspine/jetson-1   on the device: does the server take its requests?
"""


def add(commands: Subparsers) -> None:
    health = commands.add_parser(
        "health",
        help="whether a running serve or join is up: exit code 0 or 1",
        description="Tell when the SuperLink last answered; the exit code is 1 if it was more than a minute ago.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    health.add_argument("state", type=Path, metavar="DIR", help="the --state of `fedspine serve` or `fedspine join`")
    health.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    from fedspine.health import last_answer_seconds

    try:
        print(f"up: the SuperLink answered {last_answer_seconds(options.state):.0f} s ago")
    except FederationError as error:
        print(f"down: {error}", file=sys.stderr)
        return 1  # Docker knows 0 and 1 only
    return 0
