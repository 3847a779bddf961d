"""`fedspine certificates`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedspine.commands.arguments import Subparsers

EXAMPLES = """examples:
  fedspine certificates federation --host server.lab 10.0.0.1 --nodes jetson-1,jetson-2
  fedspine certificates federation --nodes jetson-3     one more device: nothing else changes

Then: fedspine serve --certificates federation ..., and on every device fedspine join --certificates federation ...
"""


def add(commands: Subparsers) -> None:
    certificates = commands.add_parser(
        "certificates",
        help="make what the machines of a real federation prove themselves with",
        description="Make a certificate authority, the server's TLS certificate, and a key pair for every device.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    certificates.add_argument("directory", type=Path, metavar="DIR", help="where the files go; none is overwritten")
    certificates.add_argument(
        "--host",
        nargs="+",
        default=[],
        metavar="NAME_OR_IP",
        help="by which the devices reach the server (localhost is always added); left out: key pairs only",
    )
    certificates.add_argument("--nodes", default="", metavar="NAME,NAME", help="a name for every device")
    certificates.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    from fedspine.certificates import AUTHORITY, make_certificates

    nodes = [name.strip() for name in options.nodes.split(",")] if options.nodes else []
    made = make_certificates(options.directory, options.host, nodes)
    where = options.directory
    if made.authority:
        print(f"{where}/ca.key: nobody needs it any more; keep it to yourself, or delete it")
        print(f"{where}/ca.crt, server.crt, server.key, *.pub: to the server, as its --certificates folder")
    for node in made.nodes:
        files = (
            f"ca.crt, {node}.key" if (where / AUTHORITY).exists() else f"{node}.key, next to the server's {AUTHORITY}"
        )
        print(f"{where}/{files}: to device {node}, as its --certificates folder")
    if made.nodes and not made.authority:
        print(f"{where}/{', '.join(f'{node}.pub' for node in made.nodes)}: to the server; start it again then")
    print("Only you can read these files. A key must be on its own machine only.")
    return 0
