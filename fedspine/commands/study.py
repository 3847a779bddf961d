"""`fedspine study`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedspine.commands.arguments import Subparsers
from fedspine.errors import ConfigError

EXAMPLES = """examples:
  fedspine study plan STUDY.toml                     cells, memory and time on the device, and what cannot run there
  fedspine study run STUDY.toml --parallel 2         stop and start it as you like
  fedspine study report STUDY.toml                   report.md, report.json and report.html
  fedspine study calibrate STUDY.toml --out here.toml   this machine as a device: device = "here.toml" in STUDY.toml

STUDY.toml: see fedspine/study/design.py and experiments/study/
"""


def add(commands: Subparsers) -> None:
    study = commands.add_parser(
        "study",
        help="learners x data x compression on a device, with verdicts on guidelines",
        description="An experiment of several factors: which learner, how much data, which compression on a device?",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    steps = study.add_subparsers(required=True, metavar="plan|run|report|calibrate")
    for name, execute, help in (
        ("plan", plan, "list the cells with memory, time and, where they cannot run, the reason"),
        ("run", run, "run the cells that are not finished"),
        ("report", report, "effects with intervals, and a verdict per guideline"),
        ("calibrate", calibrate, "time one training step here, and write this machine as a device"),
    ):
        step = steps.add_parser(name, help=help, description=help.capitalize() + ".")
        step.add_argument("study", type=Path, metavar="STUDY.toml", help="what is fixed and what varies")
        step.set_defaults(execute=execute)
        if name == "calibrate":
            step.add_argument("--out", required=True, metavar="DEVICE.toml", help="new file")
            continue
        step.add_argument("--json", action="store_true", help="print only JSON, on stdout")
        if name != "plan":
            step.add_argument("--out", metavar="DIR", help="directory (default: runs/study-NAME)")
        if name == "run":
            step.add_argument("--parallel", type=int, default=1, metavar="K", help="processes (default: 1)")
            step.add_argument("--shard", default="1/1", metavar="K/N", help="every N-th cell only, from the K-th")


def plan(options: argparse.Namespace) -> int:
    from fedspine.report.study_console import print_plan
    from fedspine.study.design import load_study
    from fedspine.study.run import plan_study

    study = load_study(options.study)
    print_plan(study, plan_study(study), as_json=options.json)
    return 0


def run(options: argparse.Namespace) -> int:
    from fedspine.report.study_console import StudyProgress
    from fedspine.study.run import run_study

    part, _, parts = options.shard.partition("/")
    if not (part.isdigit() and parts.isdigit()):
        raise ConfigError(f"--shard {options.shard}: write it as K/N, such as 1/4")
    try:
        with StudyProgress(quiet=options.json) as progress:
            shard = int(part), int(parts)
            directory = run_study(options.study, options.out, options.parallel, shard, progress.update)
    except KeyboardInterrupt:
        print("\nfedspine: interrupted; the same command continues", file=sys.stderr)
        return 130
    if not options.json:
        print(f"{directory}: `fedspine study report {options.study}` comes next", file=sys.stderr)
    return 0


def calibrate(options: argparse.Namespace) -> int:
    from fedspine.study.calibrate import calibrate as calibrate_here

    gflops = calibrate_here(options.study, options.out)
    print(f"{options.out}: {gflops:.1f} GFLOP/s in training", file=sys.stderr)
    return 0


def report(options: argparse.Namespace) -> int:
    from fedspine.study.report import FILES, report_study

    directory = report_study(options.study, options.out)
    if options.json:
        print((directory / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print(f"{directory}: {', '.join(FILES)}", file=sys.stderr)
    return 0
