"""The probe of `fedspine recommend`: the best candidates tried for some minutes of the device, by its estimate."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fedspine.errors import ConfigError
from fedspine.study.design import Cell, Study
from fedspine.study.estimate import CellPlan, plan_cell
from fedspine.study.ranking import Option
from fedspine.study.tasks import PersonalTask

PROBED = 4


def probed(
    study: Study,
    options: Sequence[Option],
    task: PersonalTask,
    seconds: float,
    on_probe: Callable[[int, int], None],
) -> list[Option]:
    """Successive halving of the first option of every learner and then the next ones.

    Each round has half as many options as the one before, and as much time.
    Errors: `ConfigError` when an option's share of the time is too short for one step.
    """
    from fedspine.study.learn import run_cell

    first = {option.plan.cell.levels["learner"]: option for option in reversed(options)}.values()
    order = sorted(options, key=lambda option: option not in first)
    left = [option for option in options if option in order[:PROBED]]
    rest = [option for option in options if option not in order[:PROBED]]
    out: list[Option] = []
    rounds = max(1, len(left).bit_length() - 1)
    done, trials = 0, sum(len(left) >> halved for halved in range(rounds))
    least = max((_shortened(study, option, task, 0.0).estimate.seconds for option in left), default=0.0)
    if (needed := least * len(left) * rounds / 60) * 60 > seconds:
        raise ConfigError(
            f"probe = {seconds / 60:g}m: too short for one step of each of the best {len(left)}; "
            f"use at least {math.ceil(100 * needed) / 100:g}m"
        )
    for _ in range(rounds):
        tried = []
        for option in left:
            on_probe(done, trials)
            plan = _shortened(study, option, task, seconds / rounds / len(left))
            with tempfile.TemporaryDirectory(prefix="fedspine-") as work:
                value = run_cell(study, plan, task, Path(work) / "run")["value"]
            tried.append(replace(option, probed=value))
            done += 1
            on_probe(done, trials)
        tried.sort(key=lambda option: -(option.probed or 0.0))  # stable: equals stay in the order of votes and cost
        keep = len(tried) // 2
        out = tried[keep:] + out
        left = tried[:keep]
    return left + out + rest


def _shortened(study: Study, option: Option, task: PersonalTask, seconds: float) -> CellPlan:
    """As many steps as so many seconds of the device allow, by their share of the whole, and at least one."""
    whole = option.plan.estimate
    share = min(1.0, seconds / max(whole.seconds, 1e-9))
    budget = {"budget": max(1, int(whole.steps * share))} if whole.steps else {}
    return plan_cell(study, Cell({**option.plan.cell.levels, **budget}, 0), task)
