"""`fedspine join`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedspine.commands.arguments import Subparsers

EXAMPLES = """examples:
  fedspine join --server 10.0.0.1:9092 --name jetson-1 --data reviews.tsv --certificates federation
  fedspine join --server 10.0.0.1:9092 --name jetson-1 --insecure    a trial; trains on its part of the run's data

Rows never leave the device: the server learns how many there are, adapters and scores trained on them, and losses. The
model of the run must be on the device too: at the same path, or as a hub name. It stays connected until stopped.
"""


def add(commands: Subparsers) -> None:
    join = commands.add_parser(
        "join",
        help="run a federation on real devices: a device's side",
        description="Start Flower's SuperNode: this machine takes part in what `fedspine serve` runs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    join.add_argument("--server", required=True, metavar="HOST:PORT", help="where `fedspine serve` runs")
    join.add_argument("--name", required=True, help="of this device, as given to `fedspine certificates`")
    join.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="this device's own rows: a file or folder as the key data takes it (default: its part of the run's data)",
    )
    trust = join.add_mutually_exclusive_group(required=True)
    trust.add_argument("--certificates", type=Path, metavar="DIR", help="folder with ca.crt and NAME.key")
    trust.add_argument("--insecure", action="store_true", help="plain text: for a trial")
    join.add_argument(
        "--device",
        default="",
        metavar="PROFILE|measure",
        help="cost=virtual: a device profile for the virtual clock; cost=measured: measure (default: as the run says)",
    )
    join.add_argument(
        "--state", type=Path, metavar="DIR", help="folder for what Flower unpacks (default: ~/.fedspine/NAME)"
    )
    join.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    from fedspine.flower.supernode import Device, join

    device = Device(
        options.server,
        options.name,
        options.state or Path.home() / ".fedspine" / options.name,
        options.certificates,
        options.data,
        options.device,
    )
    try:
        join(device, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        return 130
    return 0
