"""One cell: every user's model learns, or looks things up, and answers the user's held-out rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedspine.data.prepared import PreparedData, shared
from fedspine.study.design import Study
from fedspine.study.estimate import CellPlan
from fedspine.study.language import text_scores
from fedspine.study.retrieve import Floats, similarities, vote
from fedspine.study.tasks import PersonalTask
from fedspine.study.tuning import Answers, Trace, class_shares, start_point, tuned


def run_cell(study: Study, plan: CellPlan, task: PersonalTask, work: Path) -> dict[str, Any]:
    """The result of a cell, as JSON: `scores` of every user's held-out rows, their mean `value`, and the `trace`.

    `work`: a directory that may be used, and is left away.
    Errors: subclasses of `FedSpineError`.
    """
    levels, config = plan.cell.levels, plan.config
    data, tests = task.data(int(levels["examples"] or 0), study.test_examples)
    if task.language:
        with shared(data, config.to_json()):
            trace, found = tuned(study, plan, tests, work, text_scores(study, plan, task))
    else:
        trace, answers = _classified(study, plan, data, tests, work)
        labels = [data.test.labels[rows] for rows in tests]
        found = [[score(*pair, task, study.metric) for pair in zip(users, labels, strict=True)] for users in answers]
    for point, scores in zip(trace[-len(found) :], found, strict=True):
        point["value"] = float(np.mean([user.mean() for user in scores]))
    return {
        "levels": dict(levels),
        "seed": plan.cell.seed,
        "value": trace[-1]["value"],
        "scores": [[round(each, 6) for each in user.tolist()] for user in found[-1]],
        "trace": [point for point in trace if point["value"] is not None],
        "estimate": asdict(plan.estimate),
    }


def _classified(
    study: Study, plan: CellPlan, data: PreparedData, tests: tuple[NDArray[np.int64], ...], work: Path
) -> tuple[Trace, Answers]:
    """(learning curve, class shares at its last points): of a tuned model, of what is found, or of both."""
    learner = plan.cell.levels["learner"]
    votes = [_votes(study, plan, data, *who) for who in enumerate(tests)] if "rag" in learner else None
    if learner == "rag":
        return [start_point(plan)], [votes or []]
    with shared(data, plan.config.to_json()):
        trace, answers = tuned(study, plan, tests, work, class_shares)
    if votes:
        answers = [[(mine + found) / 2 for mine, found in zip(point, votes, strict=True)] for point in answers]
    return trace, answers


def score(shares: Floats, labels: NDArray[np.int64], task: PersonalTask, metric: str) -> Floats:
    """Of every row, larger is better: `accuracy` (0 or 1), or `mae`: minus the distance between classes as numbers."""
    answers = shares.argmax(1)
    if metric == "accuracy":
        right: Floats = (answers == labels).astype(np.float64)
        return right
    numbers = task.class_numbers()
    distance: Floats = np.abs(numbers[answers] - numbers[labels])
    return -distance


def _votes(study: Study, plan: CellPlan, data: PreparedData, user: int, rows: NDArray[np.int64]) -> Floats:
    """Class shares [rows, classes] by what is found in the user's history."""
    from fedspine.workbench import configure_threads

    levels, own = plan.cell.levels, data.owned[user]
    configure_threads(plan.config.threads)
    queries, items = data.test.texts.take(rows), data.train.texts.take(own)
    similar = similarities(str(levels["retriever"]), queries, items, study.encoder)
    return vote(similar, data.train.labels[own], len(data.classes), int(levels["history"]))
