"""Intervals, corrections and verdicts, from results that are made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedspine.study.design import Study
from fedspine.study.evidence import Evidence
from fedspine.study.guidelines import CANNOT_TELL, CONTRADICTED, SUPPORTED, Verdict, verdicts
from fedspine.study.statistics import bootstrap, holm, weighted

USERS, ROWS = 4, 40


def made_up(study: Study, quality: Callable[[dict[str, Any]], float]) -> Evidence:
    """Results whose rows are right with a probability; rows are as hard for one cell as for the other."""
    results = []
    for cell in study.cells():
        draws = np.random.default_rng([cell.seed, 5]).random((USERS, ROWS))
        scores = (draws < quality(dict(cell.levels))).astype(float)
        results.append({"name": cell.name, "seed": cell.seed, "scores": scores.tolist(), "value": scores.mean()})
    return Evidence(study, results)


def verdict_of(name: str, study: Study, quality: Callable[[dict[str, Any]], float]) -> Verdict:
    return next(each for each in verdicts(made_up(study, quality)) if each.guideline.name == name)


def of(seeds: int = 5, **vary: tuple[Any, ...]) -> Study:
    return Study("made-up", seeds=seeds, fixed={} if "task" in vary else {"task": "persona-null"}, vary=vary)


def test_bootstrap_of_a_known_difference() -> None:
    rng = np.random.default_rng(0)
    units = [[rng.normal(0.3, 1.0, 100) for _ in range(5)] for _ in range(8)]
    found = bootstrap(units)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(units))
    exact = 1.96 * np.std(units) / np.sqrt(np.size(units))
    assert exact <= (found.high - found.low) / 2 <= 2.5 * exact  # three nested draws: wider where rows alone differ
    assert found == bootstrap(units)
    assert found.p < 0.01
    assert (found.seeds, found.rows) == (8, 4000)


def test_seeds_that_disagree_make_the_interval_wide() -> None:
    agree = bootstrap([[np.full(50, 0.1)] * 3] * 4)
    differ = bootstrap([[np.full(50, value)] * 3 for value in (0.4, -0.2, 0.4, -0.2)])
    assert agree is not None
    assert differ is not None
    assert agree.mean == pytest.approx(differ.mean)
    assert (agree.low, agree.high) == pytest.approx((0.1, 0.1))
    assert differ.low < 0 < differ.high


def test_contrasts_are_paired_row_by_row_over_common_seeds() -> None:
    scores = {"a": {0: [[1, 0, 1]], 1: [[1, 1, 1]]}, "b": {1: [[0, 1, 1]]}}
    units = weighted(scores, {"a": 1.0, "b": -1.0})
    assert len(units) == 1
    assert units[0][0].tolist() == [1, 0, 0]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []


def test_planted_signs_are_found_and_a_null_is_not() -> None:
    study = of(task=("persona-recall", "persona-rule"), learner=("rag", "lora"))
    right = {("persona-recall", "rag"): 0.8, ("persona-rule", "lora"): 0.8}
    found = verdict_of("G1", study, lambda levels: right.get((levels["task"], levels["learner"]), 0.5))
    assert found.verdict == SUPPORTED
    means = [claim.contrast.interval.mean for claim, _, _ in found.claims]
    assert means[0] > 0 > means[1]
    assert verdict_of("G1", study, lambda levels: 0.5).verdict == CANNOT_TELL
    always = verdict_of("G1", study, lambda levels: 0.8 if levels["learner"] == "rag" else 0.5)
    assert always.verdict == CONTRADICTED


def test_fewer_than_three_seeds_tell_nothing() -> None:
    found = verdict_of(
        "G10", of(seeds=2, compression=("none", "bf16")), lambda levels: float(levels["compression"] == "none")
    )
    assert (found.verdict, found.why) == (CANNOT_TELL, "2 of at least 3 seeds")


@pytest.mark.parametrize(
    ("name", "vary", "supported", "contradicted"),
    [
        ("G5", {"learner": ("lora", "rag", "ia3", "prefix")}, lambda x: 0.8 if x["learner"] in ("lora", "rag") else 0.5,
         lambda x: 0.8 if x["learner"] != "rag" else 0.5),
        ("G6", {"rank": (2, 8), "learner": ("lora", "prompt")},
         lambda x: 0.4 + 0.05 * x["rank"] if x["learner"] == "prompt" else 0.5, lambda x: 0.4 + 0.05 * x["rank"]),
        ("G6", {"rank": (2, 8)}, lambda x: 0.7, lambda x: 0.4 + 0.05 * x["rank"]),
        ("G7", {"budget": (10, "800 steps", 40)}, lambda x: 0.7, lambda x: 0.3 if x["budget"] == 40 else 0.7),
        ("G10", {"compression": ("none", "width:0.5")}, lambda x: 0.9 if x["compression"] == "none" else 0.5,
         lambda x: 0.5 if x["compression"] == "none" else 0.9),
        ("S1", {"learner": ("rag", "lora"), "examples": (4, 64)}, lambda x: 0.8 if x["learner"] == "rag" else 0.4,
         lambda x: 0.4 if x["learner"] == "rag" else 0.8),
        ("S2", {"learner": ("rag", "lora", "rag+lora")}, lambda x: 0.8 if x["learner"] == "rag+lora" else 0.4,
         lambda x: {"rag": 0.9, "lora": 0.4, "rag+lora": 0.6}[x["learner"]]),
        ("G9", {"compression": ("none", "width:0.5"), "examples": (4, 64)},
         lambda x: 0.9 if x["examples"] == 64 and x["compression"] == "none" else 0.5,
         lambda x: 0.9 if x["examples"] == 4 and x["compression"] == "none" else 0.5),
    ],
)  # fmt: skip
def test_verdicts_follow_the_evidence(
    name: str,
    vary: dict[str, tuple[Any, ...]],
    supported: Callable[[dict[str, Any]], float],
    contradicted: Callable[[dict[str, Any]], float],
) -> None:
    assert verdict_of(name, of(**vary), supported).verdict == SUPPORTED
    assert verdict_of(name, of(**vary), contradicted).verdict == CONTRADICTED
    assert verdict_of(name, of(learner=("rag", "none")), supported).verdict == CANNOT_TELL
