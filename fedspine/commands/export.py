"""`fedspine export`."""

from __future__ import annotations

import argparse
import sys

from fedspine.commands.arguments import Subparsers

EXAMPLES = """examples:
  fedspine export runs/reviews --out model             the global model, adapters apart from the weights
  fedspine export runs/reviews --merge --out model     adapters folded into the weights
  fedspine export runs/reviews --device 7 --merge --onnx --out model-7
"""


def add(commands: Subparsers) -> None:
    export = commands.add_parser(
        "export",
        help="write a run's model as a folder: weights, tokenizer, model card",
        description="Write the tuned and cut model of a run as a folder that transformers or fedspine.load_model reads",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    export.add_argument("run", metavar="RUN", help="directory of a run")
    whose = export.add_mutually_exclusive_group()
    whose.add_argument("--device", type=int, metavar="N", help="the own model of device N (from 0)")
    whose.add_argument("--consensus", action="store_true", help="the global model (default)")
    export.add_argument("--merge", action="store_true", help="fold the adapters into the weights, not in DIR/adapter")
    export.add_argument("--onnx", action="store_true", help="write model.onnx too (needs the extra onnx)")
    export.add_argument("--out", required=True, metavar="DIR", help="new folder of the model")
    export.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    from fedspine import export

    try:
        done = export(options.run, out=options.out, device=options.device, merge=options.merge, onnx=options.onnx)
    except KeyboardInterrupt:
        print("\nfedspine: interrupted; nothing was written", file=sys.stderr)
        return 130
    measured = done.measured
    print(
        f"{done.directory}: {measured.parameters:,} parameters of {measured.base_parameters:,}, "
        f"accuracy {measured.accuracy:.4f} on {measured.examples} evaluation rows, "
        f"{measured.speedup:.2f} times as fast as the uncut base; README.md there says how to load it",
        file=sys.stderr,
    )
    return 0
