"""`STUDY.toml`: what is fixed, what varies, and the cells that follow.

    device = "ram-6g"             # a built-in device type or a catalogue with one (fedspine/devices/population.py)
    seeds = 3                     # 0, 1, 2
    users = 4                     # persons, each with own data
    test_examples = 40            # held out from every user
    design = "full"               # all combinations; "around": one factor at a time around the anchor
    interactions = [["learner", "examples"]]    # of design = "around": whose combinations run too
    evaluations = 1               # points of a learning curve
    target = 0.0                  # value whose cost is reported; 0: none
    metric = "accuracy"           # or "mae", for classes that are numbers; of texts see fedspine/study/metrics.py
    encoder = "all-MiniLM-L6-v2"  # of dense retrieval

    [fixed]                       # factors and any key of `fedspine keys`
    learning_rate = 1e-3
    [vary]                        # lists of levels; the anchor is the level in [fixed], or else the first
    task = ["persona-recall", "intents"]
    learner = ["rag", "lora"]
    examples = [16, 64]
    [tasks.intents]               # keys of `fedspine keys` that say where the data are and whose rows are whose
    data = "clinc150"
    partition = "column:domain"
    label_column = "intent"

A table with `task = "causal-lm"` is of a language model: plain texts, or instructions with responses. Whose a row is,
says `partition`, or `user_column = "NAME"`: a user for each of the values with the most rows. `data` may be a file of
questions of LaMP (fedspine/data/lamp.py).

`perturbation`, a key of a run (fedspine/perturbation.py), makes a good factor: the report then compares every cell with
its twin at "none". On the user's own device nobody drops out and no link matters: such a cell is its twin.

A point is a level for every factor. Points that differ only where their learner does not look are one cell: `rag` has
no rank. So a cell is run once, and compared wherever it stands.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedspine.config import RunConfig
from fedspine.errors import ConfigError, FedSpineError
from fedspine.perturbation import parse_perturbation
from fedspine.study.metrics import METRICS, score_of
from fedspine.study.persona import PERSONAS
from fedspine.toml_file import read_toml

Level = Any
"""A text or a number, as in the file."""
Point = Mapping[str, Level]
"""A level for every factor; None where the learner does not look. Of a language task also `kind`."""

LEARNERS = ("none", "rag", "lora", "rag+lora", "ia3", "prompt", "prefix")
"""The last three in scope `local` only: FedSpine federates LoRA."""
SCOPES = ("local", "federated", "federated-then-local")
RETRIEVERS = ("dense", "bm25")
COMPRESSIONS = ("none", "bf16", "width:SHARE", "depth:SHARE", "fedspine:SHARE", "int8", "nf4", "ready:FOLDER")
"""SHARE: of heads and channels (`width`, `fedspine`), or of layers (`depth`). `int8`, `nf4`: scope `local` only."""
BUDGET_UNITS = ("steps", "samples", "seconds")
DEFAULTS: dict[str, Level] = {
    "task": None,
    "learner": "lora",
    "scope": "local",
    "examples": 64,
    "model": RunConfig.model,
    "compression": "none",
    "rank": 8,
    "budget": 60,
    "history": 4,
    "retriever": "dense",
}
"""Factors. `examples`: rows of a user; `budget`: of training, in steps or with a unit; `history`: items retrieved;
`rank`: of LoRA, and how many virtual tokens `prompt` and `prefix` have."""
_IGNORED = {
    "none": ("scope", "examples", "rank", "budget", "history", "retriever", "perturbation"),
    "rag": ("scope", "model", "compression", "rank", "budget", "perturbation"),
    "lora": ("history", "retriever"),
    "ia3": ("rank", "history", "retriever"),
    "prompt": ("history", "retriever"),
    "prefix": ("history", "retriever"),
}
"""Factors that make no difference to a learner."""
LANGUAGE = "causal-lm"
_MODEL = ("model", "compression")
"""Factors that do make one to retrieval where a language model reads what is found."""
TASK_KEYS = (
    *("data", "text_column", "text_pair_column", "label_column"),
    *("task", "instruction_column", "context_column", "response_column"),
    *("user_column", "partition", "dirichlet_alpha", "min_classes"),
)
_SET_HERE = {
    **dict.fromkeys(("devices", "sampled", "rounds", "eval_every", "eval_devices", "eval_examples", "method"), "users"),
    **dict.fromkeys(("min_rank", "max_rank", "fixed_rank"), "rank"),
    **dict.fromkeys(("target_sparsity", "dtype"), "compression"),
    **dict.fromkeys(TASK_KEYS, "[tasks.NAME]"),
    "seed": "seeds",
    "population": "device",
}
"""Keys of a run that a study sets itself, and by what."""


@dataclass(frozen=True)
class Cell:
    """One combination to run, with one seed."""

    levels: Point
    seed: int

    @property
    def name(self) -> str:
        """The same for the same levels and seed, in any study."""
        text = json.dumps(dict(self.levels), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What `STUDY.toml` says."""

    name: str
    device: str = "ram-6g"
    seeds: int = 3
    users: int = 4
    test_examples: int = 40
    design: str = "full"
    interactions: tuple[tuple[str, ...], ...] = ()
    evaluations: int = 1
    target: float = 0.0
    metric: str = "accuracy"
    encoder: str = RunConfig.model
    fixed: Point = field(default_factory=dict)
    vary: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Errors: `ConfigError` for what does not exist, does not fit, or is out of bounds."""
        for key in ("seeds", "users", "test_examples", "evaluations"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{key} = {value!r}: must be a whole number of at least 1")
        if not isinstance(self.target, (int, float)) or isinstance(self.target, bool):
            raise ConfigError(f"target = {self.target!r}: must be a number, such as 0.8; 0: none")
        _one_of("design", self.design, ("full", "around"))
        _one_of("metric", self.metric, tuple(METRICS))
        score_of(self.metric, self.target)
        for pair in self.interactions:
            if len(set(pair)) < 2 or not set(pair) <= set(self.vary):
                raise ConfigError(f"interactions: {list(pair)} must be factors of [vary]: {', '.join(self.vary)}")
        for factor, level in self.fixed.items():
            self._check(factor, level)
        for factor, levels in self.vary.items():
            if not levels or len(set(map(repr, levels))) < len(levels):
                raise ConfigError(f"[vary] {factor} = {list(levels)}: must be a list of different levels")
            for level in levels:
                self._check(factor, level)
        if "task" not in {**self.fixed, **self.vary}:
            raise ConfigError(f"task: name one in [fixed] or [vary], such as {PERSONAS[0]} or NAME of a [tasks.NAME]")

    def points(self) -> list[Point]:
        """All points of the design, without seeds, the anchor first."""
        anchor = {**DEFAULTS, **{factor: levels[0] for factor, levels in self.vary.items()}, **self.fixed}
        if self.design == "full":
            groups: Sequence[tuple[str, ...]] = [tuple(self.vary)]
        else:
            groups = [(), *((factor,) for factor in self.vary), *self.interactions]
        found: dict[str, Point] = {}
        for group in groups:
            for levels in itertools.product(*(self.vary[factor] for factor in group)):
                point = {**anchor, **dict(zip(group, levels, strict=True))}
                if self.tasks.get(point["task"], {}).get("task") == LANGUAGE:
                    point["kind"] = LANGUAGE
                found.setdefault(json.dumps(point, sort_keys=True), point)
        return list(found.values())

    def cells(self) -> list[Cell]:
        """Every cell once, seed by seed, so that an unfinished study has whole seeds."""
        levels = {Cell(canonical(point), 0).name: canonical(point) for point in self.points()}
        return [Cell(each, seed) for seed in range(self.seeds) for each in levels.values()]

    def _check(self, factor: str, level: Level) -> None:
        if factor == "task":
            if level not in PERSONAS and level not in self.tasks:
                known = ", ".join((*PERSONAS, *self.tasks))
                raise ConfigError(f"task = {level!r}: must be one of {known}, or have a table [tasks.{level}]")
        elif factor in ("learner", "scope", "retriever"):
            _one_of(factor, level, {"learner": LEARNERS, "scope": SCOPES, "retriever": RETRIEVERS}[factor])
        elif factor == "compression":
            compression(level)
        elif factor == "budget":
            budget(level)
        elif factor in ("examples", "rank", "history"):
            least = 0 if factor == "examples" else 1
            if not isinstance(level, int) or isinstance(level, bool) or level < least:
                raise ConfigError(f"{factor} = {level!r}: must be a whole number of at least {least}")
        elif factor in _SET_HERE or factor not in {f.name for f in fields(RunConfig)}:
            if factor in _SET_HERE:
                raise ConfigError(f"{factor}: a study sets it itself; use {_SET_HERE[factor]}")
            near = difflib.get_close_matches(factor, (*DEFAULTS, *(f.name for f in fields(RunConfig))), n=1)
            raise ConfigError(
                f"unknown factor '{factor}'{f': did you mean {near[0]!r}?' if near else ''}; factors are "
                f"{', '.join(DEFAULTS)} and the keys of `fedspine keys`"
            )
        else:
            RunConfig.from_values({factor: level})


def canonical(point: Point) -> Point:
    """The point with None wherever its learner does not look, and no perturbation of what its scope does not have.

    A ready model takes the place of `model`.
    """
    ignored = _IGNORED.get(point["learner"], ())
    if "kind" in point:
        ignored = tuple(factor for factor in ignored if factor not in _MODEL)
    if str(point["compression"]).startswith("ready:"):
        ignored = (*ignored, "model")
    seen = {factor: None if factor in ignored else level for factor, level in point.items()}
    trouble = seen.get("perturbation")
    if trouble and seen["scope"] == "local" and parse_perturbation(trouble).kind in ("dropout", "link"):
        seen["perturbation"] = "none"
    return seen


def compression(level: Level) -> tuple[str, float]:
    """(kind, share of the prunable parameters, or of the layers, that is cut).

    Errors: `ConfigError` for an unknown level.
    """
    kind, _, share = str(level).partition(":")
    if (kind in COMPRESSIONS and not share) or (kind == "ready" and share):
        return kind, 0.0
    if kind in ("width", "depth", "fedspine"):
        try:
            ratio = float(share)
        except ValueError:
            ratio = -1.0
        if not 0 < ratio <= 0.95:
            raise ConfigError(f"compression = {level!r}: the share must be a number above 0 and at most 0.95")
        return kind, ratio
    raise ConfigError(f"compression = {level!r}: must be one of {', '.join(COMPRESSIONS)}")


def budget(level: Level) -> tuple[float, str]:
    """(amount, unit) of a training budget. Errors: `ConfigError` for an unknown unit or no amount."""
    amount, _, unit = str(level).partition(" ")
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise ConfigError(f"budget = {level!r}: must be a number above 0, such as 60, '500 samples' or '30 seconds'")
    return value, _one_of("the unit of budget", unit or "steps", BUDGET_UNITS)


def load_study(path: str | Path) -> Study:
    """Errors: `ConfigError` when the file is absent, no TOML, or holds what no study has."""
    values = read_toml(Path(path), "study file")
    known = {f.name for f in fields(Study)} - {"name"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean '{near[0]}'?" if near else "; factors and keys of a run belong in [fixed]"
            raise ConfigError(f"{path}: unknown key '{key}'{hint}")
    for table in ("fixed", "vary", "tasks"):
        if not isinstance(values.setdefault(table, {}), dict):
            raise ConfigError(f"{path}: {table} must be a table")
    for factor, levels in values["vary"].items():
        if not isinstance(levels, list):
            raise ConfigError(f"{path}: [vary] {factor} = {levels!r}: must be a list of levels")
    values["vary"] = {factor: tuple(levels) for factor, levels in values["vary"].items()}
    values["tasks"] = {name: task_keys(name, keys, Path(path).parent) for name, keys in values["tasks"].items()}
    values["interactions"] = tuple(tuple(pair) for pair in values.get("interactions", ()))
    try:
        return Study(name=Path(path).stem, **values)
    except FedSpineError as error:
        raise ConfigError(f"{path}: {error}") from None


def task_keys(name: str, keys: Any, folder: Path) -> dict[str, Any]:
    """The keys of a task; `data` may be a path from the study file's folder."""
    if not isinstance(keys, dict) or not isinstance(keys.get("data"), str):
        raise ConfigError(f"[tasks.{name}]: must be a table with data = FILE, FOLDER or hub name")
    for key in keys:
        _one_of(f"[tasks.{name}]", key, TASK_KEYS)
    _one_of(f"[tasks.{name}] task", keys.get("task", RunConfig.task), (RunConfig.task, LANGUAGE))
    if "user_column" in keys and "partition" in keys:
        raise ConfigError(f"[tasks.{name}]: user_column and partition both say whose a row is; use one of them")
    beside = folder / keys["data"]
    return {**keys, "data": str(beside)} if beside.exists() else dict(keys)


def _one_of(what: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ConfigError(f"{what}: {value!r} must be one of {', '.join(choices)}{hint}")
    return str(value)
