"""How hard a task is, measured before any training: from the users' own histories alone.

The measure and its bands are ours. The guidelines speak of easy, moderate and hard tasks without saying which is which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedspine.study.retrieve import similarities, vote
from fedspine.study.tasks import PersonalTask

EASY_BELOW, HARD_FROM = 0.4, 0.7
MANY_CLASSES = 64
"""From here on, more classes count as no harder."""
HISTORY = 4


@dataclass(frozen=True)
class Difficulty:
    """Of a task with a given amount of personal data."""

    classes: int
    majority: float
    """Accuracy of each user's most common class."""
    retrieval_gain: float
    """Leave-one-out accuracy of retrieval, as the share of what the majority leaves: 0 is no gain, 1 all of it."""

    @property
    def score(self) -> float:
        """0 to 1: the mean of how many classes there are (logarithm), and of what retrieval cannot answer."""
        many = min(1.0, math.log(max(2, self.classes), MANY_CLASSES))
        return (many + 1.0 - max(0.0, self.retrieval_gain)) / 2

    @property
    def band(self) -> str:
        return "easy" if self.score < EASY_BELOW else "hard" if self.score >= HARD_FROM else "moderate"


def measure(task: PersonalTask, examples: int, test_examples: int, retriever: str, encoder: str) -> Difficulty:
    """Means over users, on their histories of so many examples; held-out rows are not looked at.

    Errors: `DataError` when a user has fewer rows; `ModelError` for an encoder or extra that is absent.
    """
    data, _ = task.data(examples, test_examples)
    majority, found = [], []
    for own in data.owned:
        labels, texts = data.train.labels[own], data.train.texts.take(own)
        majority.append(np.bincount(labels).max() / len(labels) if len(labels) else 1.0)
        if len(labels) > 1:
            similar = similarities(retriever, texts, texts, encoder)
            np.fill_diagonal(similar, -np.inf)
            shares = vote(similar, labels, len(task.classes), min(HISTORY, len(labels) - 1))
            found.append(float((shares.argmax(1) == labels).mean()))
    common, right = float(np.mean(majority)), float(np.mean(found or majority))
    gain = (right - common) / (1.0 - common) if common < 1 else 0.0
    return Difficulty(len(task.classes), common, gain)
