"""`fedspine recommend`: what should run on this device, and why.

In this order: what fits (by the estimator of `fedspine study plan`); labelled rules; differences that earlier studies
found separable; a probe, when one is asked for. Votes decide on the learner first, then on its model, then on how it is
used; ties go to the cheapest. The same input gives the same answer: the probe's minutes too are the device's, by its
estimate.
"""

from __future__ import annotations

import json
import math
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedspine.config import RunConfig
from fedspine.errors import ConfigError
from fedspine.study.design import DEFAULTS, LANGUAGE, Cell, Point, Study, canonical, task_keys
from fedspine.study.difficulty import Difficulty, TextDifficulty, measure
from fedspine.study.estimate import CellPlan, model_parameters, plan_cell
from fedspine.study.persona import PERSONAS
from fedspine.study.rules import FOUR_BIT, FOUR_BIT_BELOW, LONG, SHORT, TIERS, Context, votes
from fedspine.study.tasks import PersonalTask, personal_task

EVIDENCE_STRENGTH = 2.0
ALIKE = 4.0
"""Earlier studies count whose amount of examples is at most so many times more, or less."""
PROBED = 4
USERS = 4
HELD_OUT = 20


@dataclass(frozen=True)
class Option:
    """A configuration with what speaks for it."""

    plan: CellPlan
    reasons: tuple[str, ...]
    strength: tuple[float, ...]
    """Of the votes for its learner, its model, and how it is used."""
    probed: float | None = None
    """Its value in the probe."""

    @property
    def levels(self) -> dict[str, Any]:
        """As they stand in a study's [fixed]."""
        return {
            factor: level for factor, level in self.plan.cell.levels.items() if level is not None and factor != "kind"
        }


@dataclass(frozen=True)
class Recommendation:
    """The answer."""

    options: tuple[Option, ...]
    """Ranked; empty when nothing fits."""
    infeasible: tuple[CellPlan, ...]
    difficulty: Difficulty | TextDifficulty
    notes: tuple[str, ...]
    """What would change the answer, and what was left out."""
    study: Study
    """Users, device and tasks that options are cells of."""

    def study_file(self, option: Option) -> str:
        """An option as a study of one cell, which `fedspine study run` takes."""
        tables = {f"tasks.{json.dumps(name)}": keys for name, keys in self.study.tasks.items()}
        lines = [f"{key} = {json.dumps(getattr(self.study, key))}" for key in ("device", "users", "encoder")]
        if self.study.metric != Study.metric:  # of texts, which may have one question per user
            lines += [f"{key} = {json.dumps(getattr(self.study, key))}" for key in ("metric", "test_examples")]
        for head, keys in {"fixed": option.levels, **tables}.items():
            lines += [f"[{head}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        return {
            "difficulty": {**asdict(self.difficulty), "score": self.difficulty.score, "band": self.difficulty.band},
            "options": [
                {
                    "levels": option.levels,
                    "reasons": option.reasons,
                    "strength": option.strength,
                    "probed": option.probed,
                    "estimate": asdict(option.plan.estimate),
                }
                for option in self.options
            ],
            "infeasible": [
                {"levels": dict(plan.cell.levels), "reason": plan.estimate.infeasible} for plan in self.infeasible
            ],
            "notes": self.notes,
        }


def recommend(
    device: str,
    task: str,
    examples: int,
    hours: float,
    *,
    probe_minutes: float = 0.0,
    evidence: Sequence[str | Path] = (),
    models: Sequence[str] = (RunConfig.model,),
    encoder: str = RunConfig.model,
    on_probe: Callable[[int, int], None] = lambda done, of: None,
) -> Recommendation:
    """`device`: as in a study. `task`: a persona task, or a TOML file with the keys of a study's [tasks.NAME]
    and perhaps `max_length`.

    `hours`: of the device. `evidence`: report.json of earlier studies. `models`: to choose
    from. `encoder`: of dense retrieval. `on_probe`: called with the probe's finished trials and how many there are.
    Errors: subclasses of `FedSpineError`.
    """
    if not hours > 0:
        raise ConfigError(f"hours = {hours}: must be above 0")
    if not 0 <= probe_minutes < math.inf:
        raise ConfigError(f"probe = {probe_minutes:g}m: must be a number of minutes, or 0 for none")
    name, tables, fixed = _task(task)
    fixed |= {"task": name, "examples": examples}
    language = tables.get(name, {}).get("task") == LANGUAGE
    metric = "perplexity" if language else Study.metric
    study = Study("recommend", device, 1, USERS, HELD_OUT, metric=metric, encoder=encoder, fixed=fixed, tasks=tables)
    made = personal_task(name, tables, study.users, 0)
    study = replace(study, test_examples=made.questions or HELD_OUT)
    points = candidates({**fixed, "kind": LANGUAGE} if language else fixed, models)
    plans = [_within(hours, plan_cell(study, Cell(point, 0), made)) for point in points]
    sizes = {model: model_parameters(model, len(made.classes), made.kind) for model in models}
    difficulty = _difficulty(study, made, plans, sizes, examples)
    found = [claim for path in evidence for claim in _findings(Path(path), examples)]
    options = ranked(plans, examples, difficulty, sizes, found)
    if probe_minutes:
        options = _probed(study, options, made, 60 * probe_minutes, on_probe)
    infeasible = tuple(plan for plan in plans if plan.estimate.infeasible)
    notes = tuple(_notes(plans, options, examples, difficulty, sizes, found))
    return Recommendation(tuple(options), infeasible, difficulty, notes, study)


def _difficulty(
    study: Study, task: PersonalTask, plans: Sequence[CellPlan], sizes: Mapping[str, int], examples: int
) -> Difficulty | TextDifficulty:
    """Of a language model's task for the smallest of the models."""
    if not task.language:
        return measure(task, examples, study.test_examples, "dense", study.encoder)
    from fedspine.study.text_difficulty import measure_text

    smallest = min(sizes, key=lambda model: sizes[model])
    config = next(plan.config for plan in plans if plan.config.model == smallest and plan.config.method == "fedavg")
    return measure_text(task, config, examples, study.test_examples, "dense", study.encoder)


def candidates(fixed: Point, models: Sequence[str]) -> list[Point]:
    """Every configuration that is considered, once. `fixed`: levels that all share, the task among them."""
    levels = {
        "learner": ("rag", "lora", "rag+lora"),
        "model": tuple(models),
        "compression": ("none", "bf16", "width:0.5"),
        "rank": (8, 32),
        "budget": (SHORT, LONG),
    }
    points = [dict(zip(levels, chosen, strict=True)) for chosen in product(*levels.values())]
    whole = [canonical({**DEFAULTS, **fixed, **point}) for point in points]
    return list({Cell(point, 0).name: point for point in whole}.values())


def ranked(
    plans: Sequence[CellPlan],
    examples: int,
    difficulty: Difficulty | TextDifficulty,
    sizes: Mapping[str, int],
    found: Sequence[Mapping[str, Any]] = (),
) -> list[Option]:
    """The feasible plans, best first. `sizes`: parameters by model; `found`: differences of earlier studies."""
    feasible = [plan for plan in plans if not plan.estimate.infeasible]
    fitting = {str(model) for plan in feasible if (model := plan.cell.levels["model"]) is not None}
    strongest = max(sorted(fitting), key=lambda model: sizes[model], default="")
    context = Context(examples, difficulty, strongest, len(sizes))
    options = []
    for plan in feasible:
        rules = votes(plan.cell.levels, context)
        reasons = [f"{rule.name}: {rule.text} ({rule.source}, strength {rule.strength:g})" for rule in rules]
        strength = {tier: sum(rule.strength for rule in rules if rule.decides == tier) for tier in TIERS}
        for claim in found:
            if plan.cell.levels[claim["factor"]] == claim["better"]:
                reasons.append(f"evidence: {claim['text']} ({claim['study']}, strength {EVIDENCE_STRENGTH:g})")
                tier = claim["factor"] if claim["factor"] in TIERS else "how"
                strength[tier] += EVIDENCE_STRENGTH
        options.append(Option(plan, tuple(reasons), tuple(strength.values())))
    return sorted(options, key=lambda each: (*(-part for part in each.strength), *_cost(each.plan)))


def _cost(plan: CellPlan) -> tuple[float, float, str]:
    return plan.estimate.seconds, plan.estimate.memory_bytes, plan.cell.name


def _within(hours: float, plan: CellPlan) -> CellPlan:
    estimate = plan.estimate
    if estimate.seconds <= 3600 * hours:
        return plan
    late = f"takes {estimate.seconds / 3600:.2f} h, more than hours = {hours:g}"
    reasons = f"{estimate.infeasible}; {late}" if estimate.infeasible else late
    return replace(plan, estimate=replace(estimate, infeasible=reasons))


def _task(task: str) -> tuple[str, dict[str, dict[str, Any]], dict[str, Any]]:
    """(name, the tables of a study with this task, the keys of a run that its file sets)."""
    if task in PERSONAS:
        return task, {}, {}
    path = Path(task)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"task = '{task}': neither one of {', '.join(PERSONAS)} nor a TOML file with data = ... and "
            f"partition = 'column:USER': {error}"
        ) from None
    fixed = {"max_length": values.pop("max_length")} if "max_length" in values else {}
    return path.stem, {path.stem: task_keys(path.stem, values, path.parent)}, fixed


def _findings(path: Path, examples: int) -> list[dict[str, Any]]:
    """Separable differences of a report, if its users had about as many examples.

    Errors: `ConfigError` when it is no report of a study.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        study, differences = report["study"], report["differences"]
        amounts = study["vary"].get("examples") or [study["fixed"].get("examples", DEFAULTS["examples"])]
        rows = [(factor, row, row["interval"]) for factor, each in differences.items() for row in each]
        separable = [(factor, row, found) for factor, row, found in rows if found["low"] > 0 or found["high"] < 0]
        claims = [
            {
                "factor": factor,
                "better": row["levels"][0 if found["mean"] > 0 else 1],
                "text": f"{row['text']} = {found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})",
                "study": study["name"],
            }
            for factor, row, found in separable
            if factor in DEFAULTS
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"evidence {path}: no report.json of `fedspine study report`: {error!r}") from None
    return claims if any(1 / ALIKE <= max(1, examples) / max(1, amount) <= ALIKE for amount in amounts) else []


def _probed(
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
    while left:
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
    return out + rest


def _shortened(study: Study, option: Option, task: PersonalTask, seconds: float) -> CellPlan:
    """As many steps as so many seconds of the device allow, by their share of the whole, and at least one."""
    whole = option.plan.estimate
    share = min(1.0, seconds / max(whole.seconds, 1e-9))
    budget = {"budget": max(1, int(whole.steps * share))} if whole.steps else {}
    return plan_cell(study, Cell({**option.plan.cell.levels, **budget}, 0), task)


def _notes(
    plans: Sequence[CellPlan],
    options: Sequence[Option],
    examples: int,
    difficulty: Difficulty | TextDifficulty,
    sizes: Mapping[str, int],
    found: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What would change the answer, found by ranking again."""
    notes = []
    first = options[0].plan.cell.name if options else ""
    freed = [replace(plan, estimate=replace(plan.estimate, infeasible="")) for plan in plans]
    if examples and (best := ranked(freed, examples, difficulty, sizes, found)[0]).plan.cell.name != first:
        why = next(plan.estimate.infeasible for plan in plans if plan.cell == best.plan.cell)
        if why:
            notes.append(f"first would be {describe(best.levels)}, if it could run: {why}")
    for other in (3, 30, 300):
        again = ranked(plans, other, difficulty, sizes, found)
        if again and again[0].plan.cell.name != first and (other < examples / 2 or other > 2 * examples):
            notes.append(f"with about {other} examples of a task as hard, first would be {describe(again[0].levels)}")
    if max(sizes.values()) < FOUR_BIT_BELOW:
        notes.append(FOUR_BIT)
    return notes


def describe(levels: Mapping[str, Any]) -> str:
    """A configuration in a line."""
    words = {"model": "{}", "compression": "compression {}", "rank": "rank {}", "budget": "{} steps"}
    found = [text.format(levels[key]) for key, text in words.items() if key in levels]
    return ", ".join([str(levels["learner"]), *found])
