"""`fedspine calibrate`."""

from __future__ import annotations

import argparse
import json
import sys

from fedspine.commands.arguments import Subparsers

EXAMPLES = """examples:
  fedspine calibrate runs/reviews                        how fast its devices were, and how well that predicts
  fedspine calibrate runs/reviews --out twin.toml        and a catalogue of them, each a type of its own
  fedspine simulate -s population=twin.toml -s devices=4 -s sampled=4
"""


def add(commands: Subparsers) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="fit device profiles to a run: a twin of its devices to simulate on",
        description="Fit compute rate, bandwidth and their spread to what every device of a run took, and show how "
        "well rounds are predicted from the rounds before. Runs with cost = measured tell of real devices.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    calibrate.add_argument("run", metavar="RUN", help="directory of a run with finished rounds")
    calibrate.add_argument("--out", metavar="CATALOGUE.toml", help="new file for -s population=CATALOGUE.toml")
    calibrate.add_argument("--json", action="store_true", help="print only the figures, as JSON, on stdout")
    calibrate.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    from fedspine.calibration import calibrate
    from fedspine.report.calibration_table import print_calibration

    result = calibrate(options.run, options.out)
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
        return 0
    print_calibration(result)
    if options.out:
        print(
            f"{options.out}: fedspine simulate -s population={options.out} -s devices={result.config.devices}",
            file=sys.stderr,
        )
    return 0
