"""`fedspine serve`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedspine.commands.arguments import Subparsers, add_run_arguments
from fedspine.config import load_config, parse_override
from fedspine.errors import ConfigError

EXAMPLES = """examples:
  fedspine serve reviews.toml --certificates federation
  fedspine serve reviews.toml -s devices=2 --insecure    a trial without certificates, on a network of your own
  fedspine serve --resume runs/reviews --certificates federation

The configuration is that of a simulation; devices is the number of keys in the certificates folder. With
-s cost=measured times are the devices' own and not those of the virtual clock. The server needs data and model for
its evaluation set, classes and start; a device needs the model, and rows: its own (join --data) or the run's.
Other machines can join at the port, and nothing else: runs are submitted on this one.
"""


def add(commands: Subparsers) -> None:
    serve = commands.add_parser(
        "serve",
        help="run a federation on real devices: the server's side",
        description="Start Flower's SuperLink, wait for the devices, and run a federation over them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    add_run_arguments(serve, "METHOD")
    serve.add_argument("--resume", metavar="DIR", help="continue the run in DIR")
    trust = serve.add_mutually_exclusive_group(required=True)
    trust.add_argument(
        "--certificates", type=Path, metavar="DIR", help="folder with ca.crt, server.crt, server.key and NAME.pub"
    )
    trust.add_argument("--insecure", action="store_true", help="plain text, and any device is accepted: for a trial")
    serve.add_argument("--host", default="0.0.0.0", help="address to listen at (default: all)")
    serve.add_argument("--port", type=int, default=9092, help="port for devices and operator (default: 9092)")
    serve.add_argument(
        "--state",
        type=Path,
        default=Path("superlink"),
        metavar="DIR",
        help="folder of database and log: a restarted server knows its devices again (default: superlink)",
    )
    serve.add_argument(
        "--wait-for",
        type=int,
        default=0,
        metavar="N",
        help="start when N devices have joined; the others may come later (default: all)",
    )
    serve.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    if options.resume and (options.config or options.set or options.out):
        raise ConfigError("--resume continues a run as it was configured: leave out CONFIG.toml, -s and --out")
    config = None if options.resume else load_config(options.config, dict(parse_override(text) for text in options.set))
    from fedspine.flower.superlink import serve
    from fedspine.run_directory import free_directory, resumed_config

    if config is None:
        directory = Path(options.resume)
        config = resumed_config(directory)
    else:
        directory = free_directory(options.out, config.method)
    try:
        serve(
            config,
            directory,
            certificates=options.certificates,
            host=options.host,
            port=options.port,
            state=options.state,
            resume=bool(options.resume),
            least=options.wait_for,
            tell=(lambda _: None) if options.json else lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        print(f"\nfedspine: interrupted; continue with: fedspine serve --resume {directory} ...", file=sys.stderr)
        return 130
    print((directory / "summary.json").read_text(encoding="utf-8").strip() if options.json else directory)
    return 0
