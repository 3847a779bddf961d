"""`fedspine bench`."""

from __future__ import annotations

import argparse
import json
import sys

from fedspine.commands.arguments import Subparsers

EXAMPLES = """examples:
  fedspine bench MODEL                                 an exported model against the one it was cut from
  fedspine bench MODEL --against OTHER --batch 1 8 32 --length 128
  fedspine bench all-MiniLM-L6-v2 --dtype bfloat16     the embedded model alone
"""


def add(commands: Subparsers) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure how large and how fast a model is",
        description="Latency, tokens per second, peak memory, parameters and bytes of a model, alone or against "
        "another: the two are timed in alternation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
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
    bench.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    from fedspine import bench
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
