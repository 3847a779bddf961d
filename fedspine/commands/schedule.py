"""`fedspine schedule`."""

from __future__ import annotations

import argparse
import json
import sys

from fedspine.commands.arguments import Subparsers, add_run_arguments
from fedspine.config import load_config, parse_override

EXAMPLES = """examples:
  fedspine schedule -s rounds=200 -s policy=random     another policy on the same devices
  fedspine schedule -s devices=1_000_000 -s sampled=100 -s rounds=1000
  fedspine schedule --surface runs/reviews             answers fitted to what a real run recorded
"""


def add(commands: Subparsers) -> None:
    schedule = commands.add_parser(
        "schedule",
        help="run the scheduler alone: no training, up to a million devices",
        description="Run policy and virtual clock without training: a fitted response surface answers for the devices.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    add_run_arguments(schedule, "schedule")
    schedule.add_argument(
        "--surface", metavar="RUN_DIR", help="fit the surface to this finished run (default: built in)"
    )
    schedule.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
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
