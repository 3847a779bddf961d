"""The command line: `fedspine simulate`, `schedule`, `export`, `bench`, `keys`."""

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
_EXPORT_EXAMPLES = """examples:
  fedspine export runs/reviews --out model             the global model, adapters apart from the weights
  fedspine export runs/reviews --merge --out model     adapters folded into the weights
  fedspine export runs/reviews --device 7 --merge --onnx --out model-7
"""
_BENCH_EXAMPLES = """examples:
  fedspine bench MODEL                                 an exported model against the one it was cut from
  fedspine bench MODEL --against OTHER --batch 1 8 32 --length 128
  fedspine bench all-MiniLM-L6-v2 --dtype bfloat16     the embedded model alone
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 2 for a mistake that can be mended, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "keys":
            _print_keys()
            return 0
        run = {"simulate": _simulate, "schedule": _schedule, "export": _export, "bench": _bench}[options.command]
        return run(options)
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
    export = commands.add_parser(
        "export",
        help="write a run's model as a folder: weights, tokenizer, model card",
        description="Write the tuned and cut model of a run as a folder that transformers or fedspine.load_model reads",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXPORT_EXAMPLES,
    )
    export.add_argument("run", metavar="RUN", help="directory of a run")
    whose = export.add_mutually_exclusive_group()
    whose.add_argument("--device", type=int, metavar="N", help="the own model of device N (from 0)")
    whose.add_argument("--consensus", action="store_true", help="the global model (default)")
    export.add_argument("--merge", action="store_true", help="fold the adapters into the weights, not in DIR/adapter")
    export.add_argument("--onnx", action="store_true", help="write model.onnx too (needs the extra onnx)")
    export.add_argument("--out", required=True, metavar="DIR", help="new folder of the model")
    _add_bench(commands)
    commands.add_parser("keys", help="list every configuration key", description="Every configuration key.")
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure how large and how fast a model is",
        description="Latency, tokens per second, peak memory, parameters and bytes of a model, alone or against "
        "another: the two are timed in alternation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_BENCH_EXAMPLES,
    )
    bench.add_argument("model", metavar="MODEL", help="an exported model, a folder of transformers, or a hub name")
    bench.add_argument(
        "--against",
        metavar="MODEL",
        help="a model to compare it with (default: what an exported model was cut from; for others none)",
    )
    bench.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N", help="batch sizes (default: 1 16)")
    for name, default, help in (
        ("length", 64, "tokens of a text or of a prompt"),
        ("repeats", 30, "timed runs of each model for each batch size"),
        ("threads", 1, "torch threads"),
        ("new-tokens", 32, "tokens that a language model generates"),
    ):
        bench.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)")
    bench.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)"
    )
    bench.add_argument("--json", action="store_true", help="print only the figures, as JSON, on stdout")


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


def _bench(options: argparse.Namespace) -> int:
    from fedspine.benchmark import bench
    from fedspine.report.bench_table import BenchConsole

    console = BenchConsole(quiet=options.json)
    try:
        result = bench(
            options.model,
            options.against,
            batch=options.batch,
            length=options.length,
            repeats=options.repeats,
            threads=options.threads,
            device=options.device,
            dtype=options.dtype,
            new_tokens=options.new_tokens,
            progress=console.progress,
        )
        console.finished(result)
    except KeyboardInterrupt:
        print("\nfedspine: interrupted", file=sys.stderr)
        return 130
    finally:
        console.close()
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
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


def _export(options: argparse.Namespace) -> int:
    from fedspine.exporting import export

    try:
        done = export(options.run, out=options.out, device=options.device, merge=options.merge, onnx=options.onnx)
    except KeyboardInterrupt:
        print("\nfedspine: interrupted; nothing was written", file=sys.stderr)
        return 130
    measured = done.measured
    print(
        f"{done.directory}: {measured.parameters / 1e6:.1f} M parameters of {measured.base_parameters / 1e6:.1f} M, "
        f"accuracy {measured.accuracy:.4f} on {measured.examples} evaluation rows, "
        f"{measured.speedup:.2f} times as fast as the uncut base; README.md there says how to load it",
        file=sys.stderr,
    )
    return 0


def _print_keys() -> None:
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
