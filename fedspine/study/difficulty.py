"""How hard a task is, measured before any training: from the users' own histories alone.

The measure and its bands are ours. The guidelines speak of easy, moderate and hard tasks without saying which is which.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from fedspine.study.retrieve import similarities, vote
from fedspine.study.tasks import PersonalTask

EASY_BELOW, HARD_FROM = 0.4, 0.7
MANY_CLASSES = 64
"""From here on, more classes count as no harder."""
HISTORY = 4


class _Graded(ABC):
    @property
    @abstractmethod
    def score(self) -> float:
        """0 to 1."""

    @property
    def band(self) -> str:
        """As the guidelines speak of it."""
        return "easy" if self.score < EASY_BELOW else "hard" if self.score >= HARD_FROM else "moderate"


@dataclass(frozen=True)
class Difficulty(_Graded):
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
    def says(self) -> str:
        return (
            f"{self.classes} classes, most common {self.majority:.2f}, retrieval answers "
            f"{max(0.0, self.retrieval_gain):.2f} of the rest"
        )


@dataclass(frozen=True)
class TextDifficulty(_Graded):
    """Of a language model's task; see `fedspine.study.text_difficulty`."""

    zero_shot: float
    """Loss per token of the model before any tuning, as the share of that of a unigram: 0 knows all, 1 is no better."""
    retrieval_gain: float
    """Share of an answer's pairs of words that stand in the items found, beyond as many other items: 0 is no gain."""
    copy_rate: float
    """Share of an answer's pairs of words that stand in what is given or in the items found."""

    @property
    def score(self) -> float:
        """0 to 1: the mean of what the model does not know, and of what retrieval does not find."""
        return (min(1.0, self.zero_shot) + 1.0 - max(0.0, self.retrieval_gain)) / 2

    @property
    def says(self) -> str:
        return (
            f"the untuned model has {self.zero_shot:.2f} of a unigram's loss, retrieval finds "
            f"{max(0.0, self.retrieval_gain):.2f} more of an answer than chance, {self.copy_rate:.2f} can be copied"
        )


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
