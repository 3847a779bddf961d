"""`fedspine recommend`: what should run on this device, and why.

In this order: what fits (by the estimator of `fedspine study plan`); labelled rules; differences that earlier studies
found separable; a probe, when one is asked for. Votes decide on the learner first, then on its model, then on how it is
used; ties go to the cheapest. The same input gives the same answer: the probe's minutes too are the device's, by its
estimate.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedspine.config import RunConfig
from fedspine.data.lamp import is_lamp
from fedspine.errors import ConfigError, ModelError
from fedspine.study.design import DEFAULTS, LANGUAGE, Cell, Study, task_keys
from fedspine.study.difficulty import Difficulty, TextDifficulty, measure
from fedspine.study.estimate import MARGIN, CellPlan, model_parameters, plan_cell
from fedspine.study.metrics import check_metric
from fedspine.study.persona import PERSONAS
from fedspine.study.quantise import check_quantiser
from fedspine.study.ranking import Option, candidates, describe, given, ranked
from fedspine.study.rules import SHORT, SMALL_RANK
from fedspine.study.tasks import PersonalTask, personal_task
from fedspine.study.workload import TIME_FACTOR, TIME_SOURCE, WEIGHT_BYTES

ALIKE = 4.0
"""Earlier studies count whose amount of examples is at most so many times more, or less."""
USERS = 4
HELD_OUT = 20


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
        keys = ("device", "users", "test_examples", "metric", "encoder")
        lines = [f"{key} = {json.dumps(getattr(self.study, key))}" for key in keys]
        for head, values in {"fixed": option.levels, **tables}.items():
            lines += [f"[{head}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        return "\n".join(lines) + "\n"

    @property
    def nearest(self) -> str:
        """Of what cannot run, what lacks least: the fewest things, and then the least memory."""

        def lacks(plan: CellPlan) -> tuple[int, float, float]:
            return plan.estimate.infeasible.count("; "), plan.estimate.memory_bytes, plan.estimate.seconds

        plan = min(self.infeasible, key=lacks)
        return f"{describe(given(plan))}: {plan.estimate.infeasible}"

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
    compressions: Sequence[str] = (),
    encoder: str = RunConfig.model,
    metric: str = "",
    on_probe: Callable[[int, int], None] = lambda done, of: None,
) -> Recommendation:
    """`device`: as in a study. `task`: a persona task, or a TOML file with the keys of a study's [tasks.NAME]
    and perhaps `max_length`.

    `hours`: of the device. `evidence`: report.json of earlier studies. `models`: to choose from. `compressions`:
    besides those always considered, such as depth:0.25 or ready:FOLDER. `encoder`: of dense retrieval. `metric`: empty
    means accuracy, or perplexity of a language model. `on_probe`: called with the probe's finished trials and how many
    there are.
    Errors: subclasses of `FedSpineError`.
    """
    if not hours > 0:
        raise ConfigError(f"hours = {hours}: must be above 0")
    if not 0 <= probe_minutes < math.inf:
        raise ConfigError(f"probe = {probe_minutes:g}m: must be a number of minutes, or 0 for none")
    name, tables, fixed = _task(task)
    fixed |= {"task": name, "examples": examples}
    language = tables.get(name, {}).get("task") == LANGUAGE
    metric = metric or ("perplexity" if language else Study.metric)
    study = Study("recommend", device, 1, USERS, HELD_OUT, metric=metric, encoder=encoder, fixed=fixed, tasks=tables)
    made = personal_task(name, tables, study.users, 0)
    check_metric(metric, made)
    study = replace(study, test_examples=made.questions or HELD_OUT)
    points = candidates({**fixed, "kind": LANGUAGE} if language else fixed, models, compressions)
    plans = [_within(hours, plan_cell(study, Cell(point, 0), made)) for point in points]
    if probe_minutes:
        plans = [_lacking(plan, _missing_extra(plan)) for plan in plans]
    sizes = {model: model_parameters(model, len(made.classes), made.kind) for model in models}
    difficulty = _difficulty(study, made, plans, sizes, examples)
    found = [claim for path in evidence for claim in _findings(Path(path), examples)]
    options = ranked(plans, examples, difficulty, sizes, found)
    if probe_minutes:
        from fedspine.study.probe import probed

        options = probed(study, options, made, 60 * probe_minutes, on_probe)
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


def _within(hours: float, plan: CellPlan) -> CellPlan:
    needed = plan.estimate.seconds / 3600
    return _lacking(plan, f"takes {needed:.2f} h, more than hours = {hours:g}" if needed > hours else "")


def _lacking(plan: CellPlan, reason: str) -> CellPlan:
    """The plan with one more reason why it cannot run; the same for none."""
    reasons = "; ".join(filter(None, (plan.estimate.infeasible, reason)))
    return replace(plan, estimate=replace(plan.estimate, infeasible=reasons))


def _missing_extra(plan: CellPlan) -> str:
    """Why a plan cannot be tried here, whatever the device has; empty when it can."""
    try:
        check_quantiser(plan.cell.levels["compression"] or "none")
    except ModelError as error:
        return str(error)
    return ""


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
    keys = task_keys(path.stem, values, path.parent)
    if not keys.keys() & {"partition", "user_column"} and not is_lamp(keys["data"]):
        raise ConfigError(
            f"task = '{task}': nothing says whose a row is; add user_column = 'NAME', or partition = 'iid' where rows "
            "are nobody's"
        )
    return path.stem, {path.stem: keys}, fixed


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
    return [*notes, *_of_quantised(plans, sizes)]


def _of_quantised(plans: Sequence[CellPlan], sizes: Mapping[str, int]) -> Iterator[str]:
    """Where quantised weights save no memory, in figures; what their time is taken from; what they need to run."""
    for model in sizes:
        own = {"learner": "lora", "model": model, "rank": SMALL_RANK, "budget": SHORT}
        megabytes = {
            plan.cell.levels["compression"]: MARGIN * plan.estimate.memory_bytes / 1e6
            for plan in plans
            if all(plan.cell.levels[factor] == level for factor, level in own.items())
        }
        least = min(("none", "bf16"), key=lambda level: megabytes[level])
        useless = [kind for kind in WEIGHT_BYTES if megabytes[kind] >= megabytes[least]]
        if useless:
            shown = ", ".join(f"{level} {megabytes[level]:.0f} MB" for level in (*useless, "bf16", "none"))
            by = f"{' or '.join(useless)} on {model} (lora of rank {SMALL_RANK}, margin included)"
            yield f"no memory is saved by {by}: {shown}"
    quantised = [plan for plan in plans if plan.cell.levels["compression"] in WEIGHT_BYTES]
    if fitting := [plan for plan in quantised if plan.estimate.infeasible in ("", _missing_extra(plan))]:
        yield f"a training step on int8 or nf4 counts as {TIME_FACTOR['nf4']:g} in float32: {TIME_SOURCE}"
        if missing := _missing_extra(fitting[0]):
            yield missing
