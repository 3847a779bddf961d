"""How hard a language model's task is: what the untuned model knows, and what retrieval finds in the user's history."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np

from fedspine.config import RunConfig
from fedspine.data.prepared import shared
from fedspine.lora.adapters import narrow
from fedspine.model import load_tokenizer
from fedspine.structure import Structure
from fedspine.study.difficulty import HISTORY, TextDifficulty
from fedspine.study.language import ask, items_of, token_sums
from fedspine.study.retrieve import nearest, similarities
from fedspine.study.tasks import PersonalTask, halves
from fedspine.workbench import workbench

Pairs = set[tuple[str, ...]]


def measure_text(
    task: PersonalTask, config: RunConfig, examples: int, test_examples: int, retriever: str, encoder: str
) -> TextDifficulty:
    """Means over users, on their histories of so many examples; held-out rows are not looked at.

    `config`: of a run with the model that is not tuned yet.
    Errors: `DataError` when a user has fewer rows; `ModelError` for a model, an encoder or extra that is absent.
    """
    data, tests = task.data(examples, test_examples)
    histories = [task.of_user(user, examples, test_examples)[0] for user in range(len(tests))]
    if not examples:
        return TextDifficulty(1.0, 0.0, 0.0)
    workbench.cache_clear()
    with shared(data, config.to_json()):
        bench = workbench(config.to_json())
    whole = Structure.full(bench.shape)
    bench.resident.mount(whole, narrow(bench.start, whole, config.max_rank, bench.shape))
    tokenizer: Any = load_tokenizer(config)
    shares, found = [], []
    for history in histories:
        responses = history["text_pair"].tolist() if task.has_responses else None
        asked = ask(tokenizer, history["text"].tolist(), responses, [[]] * len(history), config.max_length)
        losses, _, _ = token_sums(bench, asked.encoded())
        shares.append(losses.sum() / unigram_loss(asked.answers, bench.shape.vocabulary))
        if len(history) > HISTORY:
            found.append(_found(task, history, retriever, encoder))
    gain, copied = np.mean(found, axis=0) if found else (0.0, 0.0)
    return TextDifficulty(float(np.mean(shares)), float(gain), float(copied))


def unigram_loss(rows: list[list[int]], vocabulary: int) -> float:
    """Sum over all tokens, each by how often it stands in the other rows, plus one."""
    total = Counter(token for row in rows for token in row)
    size = total.total()
    loss = 0.0
    for row in rows:
        own = Counter(row)
        seen = np.array([total[token] - own[token] + 1 for token in row])
        loss -= float(np.log(seen / (size - len(row) + vocabulary)).sum())
    return loss


def _found(task: PersonalTask, history: Any, retriever: str, encoder: str) -> tuple[float, float]:
    """(retrieval gain, copy rate) of a user's rows, each with the others as its history."""
    keys, given = task.queries(history, whole=True), task.queries(history, whole=False)
    similar = similarities(retriever, given, keys, encoder)
    np.fill_diagonal(similar, -np.inf)
    items = [_pairs(item) for item in items_of(task, history, keys)]
    texts = history["text"].tolist()
    answers = history["text_pair"].tolist() if task.has_responses else [halves(text)[1] for text in texts]
    near, other, copied = [], [], []
    for row, (answer, places) in enumerate(zip(answers, nearest(similar, HISTORY).tolist(), strict=True)):
        wanted = _pairs(answer)
        following = [(row + step) % len(items) for step in range(1, HISTORY + 1)]
        shown = set().union(*(items[place] for place in places))
        near.append(_share(wanted, shown))
        other.append(_share(wanted, set().union(*(items[place] for place in following))))
        copied.append(_share(wanted, shown | _pairs(given[row])))
    chance = float(np.mean(other))
    gain = (float(np.mean(near)) - chance) / (1.0 - chance) if chance < 1 else 0.0
    return gain, float(np.mean(copied))


def _pairs(text: str) -> Pairs:
    """Words, and neighbouring pairs of them."""
    words = text.lower().split()
    return {*((word,) for word in words), *pairwise(words)}


def _share(wanted: Pairs, there: Pairs) -> float:
    """Of the pairs of words, or of a single word."""
    pairs = {each for each in wanted if len(each) == 2} or wanted
    return len(pairs & there) / max(1, len(pairs))
