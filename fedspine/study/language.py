"""How a language model is asked for a user's held-out rows, and what it makes of them.

A plain text is given up to half of its words, an instruction whole. With retrieval, the items of the user's own history
that are most alike to what is given stand before it, the nearest last. What is given has half of `max_length`, and its
beginning is cut when it is longer; the items have what it leaves, all alike, and half of that at least. The answer has
the other half, so that every learner is scored on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedspine.data.encode import IGNORED, Encoded
from fedspine.data.language import encoded_rows, end_ids, prompt_ids, response_ids, token_ids
from fedspine.errors import ConfigError
from fedspine.generation import generate
from fedspine.model import load_tokenizer
from fedspine.study.design import Study
from fedspine.study.estimate import CellPlan
from fedspine.study.metrics import METRICS, RESPONSES, Floats, of_answers, of_tokens
from fedspine.study.retrieve import nearest, similarities
from fedspine.study.tasks import PersonalTask, halves
from fedspine.study.tuning import Answer
from fedspine.training import predictions
from fedspine.workbench import Workbench, configure_threads

SEPARATOR = "\n\n"
"""Between items, and before what is given."""


@dataclass(frozen=True)
class Asked:
    """Token ids of what a model is given, [rows], and of what it has to answer."""

    prompts: list[list[int]]
    answers: list[list[int]]

    def encoded(self) -> Encoded:
        """Rows on whose answers alone the loss is taken."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return encoded_rows([(prompt + answer, len(prompt), row) for row, (prompt, answer) in enumerate(pairs)])


def text_scores(study: Study, plan: CellPlan, task: PersonalTask) -> Answer:
    """Gives the scores [rows] of a user's held-out rows by the mounted model.

    What it is asked is made now, before anything is trained. Errors: subclasses of `FedSpineError`.
    """
    config, levels = plan.config, plan.cell.levels
    tokenizer: Any = load_tokenizer(config)
    configure_threads(config.threads)

    def asked_of(user: int) -> Asked:
        history, held_out = task.of_user(user, int(levels["examples"] or 0), study.test_examples)
        items: list[list[str]] = [[]] * len(held_out)
        if "rag" in levels["learner"]:
            queries, keys = task.queries(held_out, whole=False), task.queries(history, whole=True)
            similar = similarities(str(levels["retriever"]), queries, keys, study.encoder)
            shown = items_of(task, history, keys)
            items = [[shown[at] for at in found[::-1]] for found in nearest(similar, int(levels["history"])).tolist()]
        responses = held_out["text_pair"].tolist() if task.has_responses else None
        return ask(tokenizer, held_out["text"].tolist(), responses, items, config.max_length)

    asked = [asked_of(user) for user in range(study.users)]

    def scores(bench: Workbench, user: int, _: NDArray[np.int64]) -> Floats:
        if METRICS[study.metric].suits == RESPONSES:
            most = min(config.generate_tokens, config.max_length // 2)
            written = generate(bench.resident, tokenizer, asked[user].prompts, most)
            wanted = task.of_user(user, 0, study.test_examples)[1]["text_pair"].tolist()
            return of_answers(study.metric, written, wanted)
        return of_tokens(study.metric, *token_sums(bench, asked[user].encoded()))

    return scores


def items_of(task: PersonalTask, history: Any, keys: Sequence[str]) -> list[str]:
    """The items of a history as a model reads them: plain texts, or what was asked with its answer."""
    if not task.has_responses:
        return list(keys)
    pairs = zip(keys, history["text_pair"], strict=True)
    return [key if key == answer else f"{key}\n{answer}" for key, answer in pairs]


def ask(
    tokenizer: Any, texts: list[str], responses: list[str] | None, items: Sequence[list[str]], max_length: int
) -> Asked:
    """`items`: of every row, what stands before it. Each prompt and each answer has at most half of `max_length`.

    Errors: `ConfigError` when nothing but what stands around an instruction would fit.
    """
    room = max_length // 2
    if responses is None:
        given = [halves(text)[0] for text in texts]
        answers = [_continuation(tokenizer, *pair) for pair in zip(texts, given, strict=True)]
    else:
        given, answers = texts, response_ids(tokenizer, texts, responses)

    def prompt(text: str) -> list[int]:
        return (token_ids(tokenizer, [text], begun=True) if responses is None else prompt_ids(tokenizer, [text]))[0]

    if (frame := len(prompt(""))) > room // 2:
        raise ConfigError(
            f"max_length = {max_length}: half of it is for what a model is given, of which what stands around an "
            f"instruction takes {frame} tokens; use at least {4 * frame}"
        )
    prompts = []
    for text, found in zip(given, items, strict=True):
        if found:
            if (over := len(prompt(text)) - room // 2) > 0:
                text = tokenizer.decode(token_ids(tokenizer, [text], begun=False)[0][over:])
            free = room - len(prompt(text))
            each = max(1, free // len(found) - len(token_ids(tokenizer, [SEPARATOR], begun=False)[0]))
            text = SEPARATOR.join([*(_beginning(tokenizer, item, each) for item in found), text])
        prompts.append(prompt(text)[-room:])
    return Asked(prompts, [answer[: max_length - room] for answer in answers])


def token_sums(bench: Workbench, rows: Encoded) -> tuple[Floats, Floats, Floats]:
    """Of the mounted model, [rows] each: sum of the losses, number of right tokens, and of tokens that are learned."""
    order = np.argsort(rows.lengths, kind="stable")
    sums = np.zeros((3, len(rows)))
    done = 0
    with torch.inference_mode():
        for batch in bench.evaluation_batches(rows.take(order)):  # which are in this order: it is by length already
            logits, labels = predictions(bench.resident, batch)
            losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED).double()
            known = labels != IGNORED
            now = order[done : done + len(batch.input_ids)]
            done += len(now)
            for row, values in enumerate((losses, (logits.argmax(-1) == labels) & known, known)):
                sums[row, now] = values.view(len(now), -1).sum(1).cpu().numpy()
    return sums[0], sums[1], sums[2]


def _continuation(tokenizer: Any, text: str, given: str) -> list[int]:
    """The tokens of a text from where those of its beginning are no longer its own, with what ends it."""
    whole, known = token_ids(tokenizer, [text, given], begun=True)
    same = [one == other for one, other in zip(whole, known, strict=False)]
    return whole[same.index(False) if False in same else len(same) :] + end_ids(tokenizer)


def _beginning(tokenizer: Any, text: str, tokens: int) -> str:
    ids = token_ids(tokenizer, [text], begun=False)[0]
    return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens]))
