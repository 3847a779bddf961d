"""`fedspine simulate`."""

from __future__ import annotations

import argparse
import json
import os
import sys

from fedspine.commands.arguments import Subparsers, add_run_arguments
from fedspine.config import load_config, parse_override
from fedspine.errors import ConfigError

EXAMPLES = """examples:
  fedspine simulate                                    80 devices, embedded model and task
  fedspine simulate -s devices=20 -s rounds=10         smaller
  fedspine simulate -s method=fedavg                   the unpruned reference
  fedspine simulate -s data=reviews/ -s partition=dirichlet --out runs/reviews
  fedspine simulate experiments/first_federation/sst2.toml -s seed=1
  fedspine simulate --resume runs/reviews              continue after a stop or a kill
  fedspine simulate --address 10.0.0.1:6379            on a Ray cluster: several machines or GPUs
"""


def add(commands: Subparsers) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="run a federation on simulated devices",
        description="Run a federation on simulated devices: a plan, a progress bar, a table, curves, a checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    add_run_arguments(simulate, "METHOD")
    simulate.add_argument("--resume", metavar="DIR", help="continue the run in DIR")
    simulate.add_argument(
        "--engine",
        choices=("auto", "inline", "grouped", "ray"),
        default="auto",
        help="ray: Flower's runtime on Ray; inline: one process; grouped: one process that trains the devices of a "
        "round as one batch; auto (default): grouped on a GPU and in bfloat16, ray with several workers, else inline",
    )
    simulate.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes of the ray engine (default: cores; with --address at most N)",
    )
    simulate.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a Ray cluster that runs already, with this machine in it; model and data must lie at the same absolute "
        "path on each of its machines (default: a Ray of this run alone)",
    )
    simulate.add_argument("--profile", action="store_true", help="show at the end where the wall time went")
    simulate.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    if options.resume and (options.config or options.set or options.out):
        raise ConfigError("--resume continues a run as it was configured: leave out CONFIG.toml, -s and --out")
    workers = options.workers
    if workers is None and options.address is None:
        workers = len(os.sched_getaffinity(0))
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    config = None
    if not options.resume:
        config = load_config(options.config, dict(parse_override(text) for text in options.set))
    # Only now the heavy part: torch, transformers and Flower take seconds to import.
    from fedspine import simulate
    from fedspine.report.console import ConsoleObserver

    observer = ConsoleObserver(quiet=options.json, profiled=options.profile)
    try:
        result = simulate(
            config,
            out=options.out,
            resume=options.resume,
            engine=options.engine,
            workers=workers,
            address=options.address,
            observer=observer,
        )
    except KeyboardInterrupt:
        observer.close()
        where = observer.directory
        follow = f"; continue with: fedspine simulate --resume {where}" if where else " before the first round"
        print(f"\nfedspine: interrupted{follow}", file=sys.stderr)
        return 130
    finally:
        observer.close()
    if options.json:
        print(json.dumps(result.summary, indent=2))
    return 0
