"""The command line: `fedspine simulate`, `compare`, `schedule`, `keys`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedspine import __version__
from fedspine.config import Key, RunConfig, load_config, parse_override
from fedspine.errors import ConfigError, FedSpineError

_EXAMPLES = """examples:
  fedspine simulate                                    80 devices, embedded model and task
  fedspine simulate -s devices=20 -s rounds=10         smaller
  fedspine simulate -s method=fedavg                   the unpruned reference
  fedspine simulate -s data=reviews/ -s partition=dirichlet --out runs/reviews
  fedspine simulate experiments/first_federation/sst2.toml -s seed=1
  fedspine simulate --resume runs/reviews              continue after a stop or a kill
  fedspine simulate --address 10.0.0.1:6379            on a Ray cluster: several machines or GPUs
"""
_SCHEDULE_EXAMPLES = """examples:
  fedspine schedule -s rounds=200 -s policy=random     another policy on the same devices
  fedspine schedule -s devices=1_000_000 -s sampled=100 -s rounds=1000
  fedspine schedule --surface runs/reviews             answers fitted to what a real run recorded
"""
_COMPARE_EXAMPLES = """examples:
  fedspine compare --methods fedavg,fedspine,fedspine-paper --seeds 3 --parallel 2
  fedspine compare experiments/headline/sst2.toml --out runs/sst2      methods as tables of the file:
      [methods.fedspine]
      [methods."no pruning"]
      target_sparsity = 0.0
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 2 for a mistake that can be mended, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "keys":
            _print_keys()
            return 0
        return {"simulate": _simulate, "schedule": _schedule, "compare": _compare}[options.command](options)
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
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"fedspine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    simulate = commands.add_parser(
        "simulate",
        help="run a federation on simulated devices",
        description="Run a federation on simulated devices: a plan, a progress bar, a table, curves, a checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXAMPLES,
    )
    _add_run_arguments(simulate, "METHOD")
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
    schedule = commands.add_parser(
        "schedule",
        help="run the scheduler alone: no training, up to a million devices",
        description="Run policy and virtual clock without training: a fitted response surface answers for the devices.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_SCHEDULE_EXAMPLES,
    )
    _add_run_arguments(schedule, "schedule")
    schedule.add_argument(
        "--surface", metavar="RUN_DIR", help="fit the surface to this finished run (default: built in)"
    )
    compare = commands.add_parser(
        "compare",
        help="methods x seeds on the same devices, with tables and figures",
        description="Run methods with several seeds on identical partitions, device draws and clocks, side by side. "
        "Stop and start it as you like: finished runs stay, a killed one continues.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_COMPARE_EXAMPLES,
    )
    compare.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="keys that all share, and tables [methods.NAME]"
    )
    compare.add_argument(
        "-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key that all share"
    )
    compare.add_argument(
        "--methods",
        metavar="A,B,...",
        help="presets or tables of CONFIG.toml, the reference first (default: its tables, or else all presets)",
    )
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    compare.add_argument("--parallel", type=int, default=1, metavar="K", help="runs at a time (default: 1)")
    compare.add_argument("--out", default="comparison", metavar="DIR", help="directory (default: comparison)")
    compare.add_argument("--json", action="store_true", help="print comparison.json on stdout, and nothing else")
    commands.add_parser("keys", help="list every configuration key", description="Every configuration key.")
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="keys of the run")
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (see `fedspine keys`)"
    )
    parser.add_argument("--out", metavar="DIR", help=f"new directory of the run (default: runs/{name}-DATE-TIME)")
    parser.add_argument("--json", action="store_true", help="print only the summary, as JSON, on stdout")


def _schedule(options: argparse.Namespace) -> int:
    config = load_config(options.config, dict(parse_override(text) for text in options.set))
    from fedspine.report.schedule_console import ScheduleConsole
    from fedspine.schedule_only import schedule

    console = ScheduleConsole(config.rounds, quiet=options.json)
    try:
        result = schedule(config, surface=options.surface, out=options.out, on_round=console.round_done)
        console.finished(result.summary, result.directory)
    except KeyboardInterrupt:
        print("\nfedspine: interrupted; schedule.jsonl holds the rounds until here", file=sys.stderr)
        return 130
    finally:
        console.close()
    if options.json:
        print(json.dumps(result.summary, indent=2))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from fedspine.comparison import FILE, compare, plan
    from fedspine.report.comparison_console import ComparisonConsole

    shared = dict(parse_override(text) for text in options.set)
    methods = [name.strip() for name in options.methods.split(",")] if options.methods else None
    console = ComparisonConsole(plan(options.config, methods, options.seeds, shared), quiet=options.json)
    try:
        done = compare(
            options.config,
            methods=methods,
            seeds=options.seeds,
            parallel=options.parallel,
            out=options.out,
            on_progress=console.update,
            **shared,
        )
        console.finished(done)
    except KeyboardInterrupt:
        console.close()
        print("\nfedspine: interrupted; the same command continues", file=sys.stderr)
        return 130
    finally:
        console.close()
    if options.json:
        print((done.directory / FILE).read_text(encoding="utf-8"), end="")
    return 0


def _simulate(options: argparse.Namespace) -> int:
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
    from fedspine.report.console import ConsoleObserver
    from fedspine.simulation import simulate

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


def _print_keys() -> None:
    for field in dataclasses.fields(RunConfig):
        key: Key = field.metadata["key"]
        bounds = " | ".join(key.choices)
        if not bounds and (key.minimum is not None or key.maximum is not None):
            low = "" if key.minimum is None else f"{key.minimum:g} <= "
            high = "" if key.maximum is None else f" <= {key.maximum:g}"
            bounds = f"{low}value{high}"
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        print(f"{field.name} = {default!s}")
        print(f"    {key.help}{f'  [{bounds}]' if bounds else ''}")
