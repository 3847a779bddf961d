"""What held-out rows are scored by. A score is larger where it is better, whatever the metric.

- `accuracy`, `mae`: of classes; the latter is minus the distance between classes as numbers.
- `perplexity`, `token-accuracy`: of a language model, over the tokens of what it has to continue or answer: for
  `perplexity` minus their mean loss, which is minus the logarithm of perplexity. A difference of 0.1 is 10 % of
  perplexity, at any level.
- `rouge-l`, `exact-match`: of what a language model writes, against the responses of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedspine.errors import ConfigError

if TYPE_CHECKING:
    from fedspine.study.tasks import PersonalTask

Floats = NDArray[np.float64]
CLASSES, TEXT, RESPONSES = "classes", "texts of task = 'causal-lm'", "responses to instructions"


@dataclass(frozen=True)
class Metric:
    says: str
    """What a report calls the mean of the scores."""
    suits: str
    """What a task must have."""


METRICS = {
    "accuracy": Metric("accuracy", CLASSES),
    "mae": Metric("minus the mean absolute error", CLASSES),
    "perplexity": Metric("minus the logarithm of perplexity", TEXT),
    "token-accuracy": Metric("accuracy of the next token", TEXT),
    "rouge-l": Metric("ROUGE-L (F)", RESPONSES),
    "exact-match": Metric("share of answers that are right to the letter", RESPONSES),
}


def check_metric(name: str, task: PersonalTask) -> None:
    """Errors: `ConfigError` for a metric that does not suit the task, or without the extra that it needs; `DataError`
    for `mae` of classes that are no numbers."""
    has = (CLASSES,) if not task.language else (TEXT, RESPONSES) if task.has_responses else (TEXT,)
    if METRICS[name].suits not in has:
        fitting = ", ".join(each for each, metric in METRICS.items() if metric.suits in has)
        raise ConfigError(
            f"metric = '{name}' is for {METRICS[name].suits}, and task '{task.name}' has {has[-1]}; use {fitting}"
        )
    if name == "mae":
        task.class_numbers()
    if name == "rouge-l":
        try:
            import torchmetrics.functional.text  # noqa: F401
        except ImportError:
            raise ConfigError("metric = 'rouge-l' needs torchmetrics: pip install 'fedspine[text]'") from None


def score_of(metric: str, value: float) -> float:
    """The score that a value stands for, as a user states it.

    Errors: `ConfigError` for what cannot be a perplexity.
    """
    if metric != "perplexity" or not value:
        return value
    if value < 1:
        raise ConfigError(f"target = {value:g}: a perplexity is at least 1; 0: no target")
    return -math.log(value)


def of_tokens(metric: str, losses: Floats, right: Floats, tokens: Floats) -> Floats:
    """Scores [rows] for `perplexity` or `token-accuracy`: of sums over the tokens of every row.

    Their mean is that over all tokens, which is a ratio of two sums over rows; around it they scatter as a ratio does
    (linearised: Cochran, Sampling Techniques, 1977, section 6.4), so that long rows do not make intervals too wide.
    """
    values = -losses if metric == "perplexity" else right
    rate = values.sum() / tokens.sum()
    scores: Floats = rate + (values - rate * tokens) / tokens.mean()
    return scores


def of_answers(metric: str, answers: list[str], responses: list[str]) -> Floats:
    """Scores [rows] for `exact-match`, white space at the ends aside, or `rouge-l`."""
    pairs = [(answer.strip(), response.strip()) for answer, response in zip(answers, responses, strict=True)]
    if metric == "exact-match":
        return np.array([float(answer == response) for answer, response in pairs])
    from torchmetrics.functional.text import rouge_score

    return np.array([float(rouge_score(*pair, rouge_keys="rougeL")["rougeL_fmeasure"]) for pair in pairs])
