"""`fedspine compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedspine.commands.arguments import Subparsers
from fedspine.config import parse_override

EXAMPLES = """examples:
  fedspine compare --methods fedavg,fedspine,fedspine-paper --seeds 3 --parallel 2
  fedspine compare experiments/headline/sst2.toml --out runs/sst2      methods as tables of the file:
      [methods.fedspine]
      [methods."no pruning"]
      target_sparsity = 0.0
"""


def add(commands: Subparsers) -> None:
    compare = commands.add_parser(
        "compare",
        help="methods x seeds on the same devices, with tables and figures",
        description="Run methods with several seeds on identical partitions, device draws and clocks, side by side. "
        "Stop and start it as you like: finished runs stay, a killed one continues.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
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
        help="presets or tables of CONFIG.toml, the reference first (default: its tables, or else "
        "fedavg,fedspine,fedspine-paper)",
    )
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="how many seeds (default: 3)")
    compare.add_argument(
        "--first-seed", type=int, default=0, metavar="K", help="they are K to K+N-1, to share them out (default: 0)"
    )
    compare.add_argument("--parallel", type=int, default=1, metavar="K", help="runs at a time (default: 1)")
    compare.add_argument("--out", default="comparison", metavar="DIR", help="directory (default: comparison)")
    compare.add_argument(
        "--target",
        type=float,
        metavar="ACC",
        help="accuracy at the final sparsity whose time is compared (default: what every run reached)",
    )
    compare.add_argument(
        "--baseline", default="", metavar="METHOD", help="whose costs are 100 %% (default: the reference)"
    )
    compare.add_argument(
        "--inference", action="store_true", help="also time the models that the first seed leaves, into DIR/models"
    )
    compare.add_argument(
        "--retime",
        metavar="DIR",
        help="a comparison with another population: methods that never look at times are not trained again",
    )
    compare.add_argument("--json", action="store_true", help="print comparison.json on stdout, and nothing else")
    compare.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    from fedspine.comparison import FILE, compare, plan
    from fedspine.report.comparison_console import ComparisonConsole

    shared = dict(parse_override(text) for text in options.set)
    methods = [name.strip() for name in options.methods.split(",")] if options.methods else None
    console = ComparisonConsole(
        plan(options.config, methods, options.seeds, shared, options.first_seed), quiet=options.json
    )
    try:
        done = compare(
            options.config,
            methods=methods,
            seeds=options.seeds,
            first_seed=options.first_seed,
            parallel=options.parallel,
            out=options.out,
            target=options.target,
            baseline=options.baseline,
            inference=options.inference,
            retime=options.retime,
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
