"""Candidates of `fedspine recommend`, in the order of what speaks for them: labelled rules and earlier studies.

Votes decide on the learner first, then on its model, then on how it is used; ties go to the cheapest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedspine.study.design import DEFAULTS, Cell, Point, canonical
from fedspine.study.difficulty import Difficulty, TextDifficulty
from fedspine.study.estimate import CellPlan
from fedspine.study.rules import LONG, SHORT, TIERS, Context, votes

EVIDENCE_STRENGTH = 2.0


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
        return {factor: level for factor, level in given(self.plan).items() if factor != "kind"}


def candidates(fixed: Point, models: Sequence[str], compressions: Sequence[str] = ()) -> list[Point]:
    """Every configuration that is considered, once. `fixed`: levels that all share, the task among them.

    `compressions`: besides those always considered.
    """
    levels = {
        "learner": ("rag", "lora", "rag+lora"),
        "model": tuple(models),
        "compression": ("none", "bf16", "width:0.5", "int8", "nf4", *compressions),
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
    context = Context(examples, difficulty, strongest, len(fitting))
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


def given(plan: CellPlan) -> dict[str, Any]:
    """Levels that its learner looks at."""
    return {factor: level for factor, level in plan.cell.levels.items() if level is not None}


def describe(levels: Mapping[str, Any]) -> str:
    """A configuration in a line."""
    words = {"model": "{}", "compression": "compression {}", "rank": "rank {}", "budget": "{} steps"}
    found = [text.format(levels[key]) for key, text in words.items() if key in levels]
    return ", ".join([str(levels["learner"]), *found])
