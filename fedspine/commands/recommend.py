"""`fedspine recommend`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from fedspine.commands.arguments import Subparsers
from fedspine.config import RunConfig
from fedspine.errors import ConfigError

if TYPE_CHECKING:
    from fedspine.study.recommend import Recommendation

EXAMPLES = """examples:
  fedspine recommend --device ram-4g --task TASK.toml --examples 120 --hours 1
  fedspine recommend --device BOARD.toml --task TASK.toml --examples 20 --hours 0.5 --probe 10m
  fedspine recommend --device ram-4g --task TASK.toml --examples 64 --hours 1 --evidence runs/study-phone/report.json
  fedspine recommend --device ram-4g --task TASK.toml --examples 64 --hours 1 --compression depth:0.25 ready:FOLDER

TASK.toml: keys of a study's [tasks.NAME], and max_length where texts are long, such as
  data = "reviews.jsonl"
  user_column = "user"
with task = "causal-lm" it is one of a language model, which --model has to name.

Considered are rag, lora and rag+lora; models as they are and in bf16, width:0.5, int8 and nf4; two ranks and budgets.
Exit status: 0 with an answer, 1 when nothing fits (every reason is told), 2 for a mistake.
"""
SHOWN = 5


def add(commands: Subparsers) -> None:
    recommend = commands.add_parser(
        "recommend",
        help="what should run on a device: ranked configurations with reasons",
        description="Rank configurations for a device and a task: what fits, then labelled rules, then evidence of "
        "earlier studies, then a probe; ties go to the cheapest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    recommend.add_argument("--device", required=True, metavar="PROFILE", help="a built-in type or a TOML file with one")
    recommend.add_argument("--task", required=True, metavar="FILE", help="TOML file, or a persona task")
    recommend.add_argument("--examples", required=True, type=int, metavar="N", help="that a user has")
    recommend.add_argument("--hours", required=True, type=float, metavar="H", help="of the device, for training")
    recommend.add_argument(
        "--model", nargs="+", default=[RunConfig.model], metavar="MODEL", help="models to choose from"
    )
    recommend.add_argument(
        "--compression", nargs="+", default=[], metavar="LEVEL", help="to consider too: depth:0.25, ready:FOLDER, ..."
    )
    recommend.add_argument("--metric", default="", help="of the task, as in a study (default: accuracy or perplexity)")
    recommend.add_argument("--encoder", default=RunConfig.model, metavar="MODEL", help="of dense retrieval")
    recommend.add_argument("--evidence", nargs="+", default=[], metavar="REPORT.json", help="of earlier studies")
    recommend.add_argument("--probe", default="0m", metavar="10m", help="try the best, in minutes of the device")
    recommend.add_argument("--json", action="store_true", help="print everything, as JSON, on stdout")
    recommend.set_defaults(execute=run)


def run(options: argparse.Namespace) -> int:
    from fedspine.report.study_console import StudyProgress
    from fedspine.study.recommend import recommend

    try:
        minutes = float(options.probe.removesuffix("m"))
    except ValueError:
        raise ConfigError(f"--probe {options.probe}: write it in minutes, such as 10m") from None
    with StudyProgress("trials", quiet=options.json) as progress:
        found = recommend(
            options.device,
            options.task,
            options.examples,
            options.hours,
            probe_minutes=minutes,
            evidence=options.evidence,
            models=options.model,
            compressions=options.compression,
            metric=options.metric,
            encoder=options.encoder,
            on_probe=progress.update,
        )
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print("\n".join(_lines(found)))
    if not found.options:
        lacking = f"nothing can run as asked; the nearest is {found.nearest}"
        print(f"fedspine: error: {lacking}; give it what it lacks, or a smaller --model", file=sys.stderr)
    return 0 if found.options else 1


def _lines(found: Recommendation) -> list[str]:
    from fedspine.study.estimate import MARGIN
    from fedspine.study.ranking import describe, given

    hard = found.difficulty
    lines = [f"task: {hard.band} ({hard.score:.2f}): {hard.says}"]
    if not found.options:
        lines += ["", "nothing fits:"]
        lines += [f"  {describe(given(plan))}: {plan.estimate.infeasible}" for plan in found.infeasible]
    for place, option in enumerate(found.options[:SHOWN], start=1):
        need = option.plan.estimate
        tried = "" if option.probed is None else f", {option.probed:.3f} in the probe"
        lines += [
            "",
            f"{place}. {describe(option.levels)} (votes {' + '.join(f'{part:g}' for part in option.strength)}{tried})",
        ]
        lines.append(
            f"   {MARGIN * need.memory_bytes / 1e6:.0f} MB at most, {need.seconds:.1f} s, "
            f"{(need.upload_bytes + need.download_bytes) / 1e6:.1f} MB sent"
        )
        lines += [f"   - {reason}" for reason in option.reasons]
    if found.options:
        lines += ["", "the first as STUDY.toml:"]
        lines += [f"  {line}" for line in found.study_file(found.options[0]).splitlines()]
    return [*lines, "", *(f"* {note}" for note in found.notes)]
