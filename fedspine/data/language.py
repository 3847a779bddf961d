"""Texts for a causal language model: plain, or instructions with their responses, on which alone the loss is taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.data.columns import LABEL_NAMES, TextTask, check_filled, known, named, optional
from fedspine.data.encode import Encoded

TEXT_NAMES = ("text", "content", "story", "document", "speeches")
INSTRUCTION_NAMES = ("instruction", "prompt", "question", "query")
CONTEXT_NAMES = ("context", "input")
RESPONSE_NAMES = ("response", "output", "completion", "answer")


def language_task(config: RunConfig, train: pd.DataFrame, test: pd.DataFrame) -> TextTask:
    """The text, or the instruction with its context as `text` and the response as `text_pair`.

    A column of lists gives one row per item. Labels only serve partitions: of a column such as `category`, or one for
    all. Errors: `DataError` for a missing column, an empty text or response.
    """
    instruction, response = _instructions(config, train)
    text = instruction or named(config, train, "text_column", TEXT_NAMES)
    context = optional(config, train, "context_column", CONTEXT_NAMES) if response else None
    label = optional(config, train, "label_column", LABEL_NAMES)
    frames = [
        check_filled(config, name, _one_per_item(frame, text), (text, response))
        for name, frame in (("train", train), ("evaluation", test))
    ]
    values = sorted(set(frames[0][label].astype(str))) if label else ["all"]
    index = {value: number for number, value in enumerate(values)}
    done = []
    for frame in frames:
        joined = frame[text].astype(str)
        if context and context in frame:
            more = frame[context].fillna("").astype(str)
            joined = joined.where(more.str.strip() == "", joined + "\n\n" + more)
        of_class = frame[label].astype(str).map(index).fillna(0) if label and label in frame else 0
        kept = frame.drop(columns=[c for c in ("text", "text_pair", "label") if c in frame])
        kept = kept.assign(text=joined, label=np.asarray(of_class, dtype=np.int64))
        done.append(kept.assign(text_pair=frame[response].astype(str)) if response else kept)
    return TextTask(Path(config.data).name, tuple(values), *done)


def _one_per_item(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row for every item of a column of lists; other columns as they are."""
    if column in frame and frame[column].map(lambda value: isinstance(value, list)).any():
        return frame.explode(column, ignore_index=True)
    return frame


def encode_language(
    tokenizer: Any, texts: list[str], responses: list[str] | None, labels: NDArray[np.int64], max_length: int
) -> Encoded:
    """Token ids with the end of text after every row, and which of them are learned.

    A plain text that is too long becomes several rows, each of which begins with the last token of the one before. Of
    an instruction that is too long with its response, the beginning goes, up to half of `max_length`, and then the end
    of the response.
    """
    rows: list[tuple[list[int], int, int]] = []
    if responses is None:
        for ids, label in zip(token_ids(tokenizer, texts, begun=True), labels.tolist(), strict=True):
            whole = ids + end_ids(tokenizer)
            starts = range(0, len(whole) - 1, max_length - 1)
            rows += [(whole[start : start + max_length], 1, label) for start in starts]
    else:
        answers = response_ids(tokenizer, texts, responses)
        for given, answer, label in zip(prompt_ids(tokenizer, texts), answers, labels.tolist(), strict=True):
            given = given[-max(max_length - len(answer), max_length // 2) :]
            rows.append(((given + answer)[:max_length], len(given), label))
    return encoded_rows(rows)


def encoded_rows(rows: Sequence[tuple[list[int], int, int]]) -> Encoded:
    """Of token ids, how many of them are only given, and the label of every row."""
    lengths = np.array([len(ids) for ids, _, _ in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    known = np.repeat([given for _, given, _ in rows], lengths)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _, _ in rows])
    return Encoded(flat, offsets, None, np.array([label for _, _, label in rows], dtype=np.int64), place >= known)


def prompt_ids(tokenizer: Any, instructions: list[str]) -> list[list[int]]:
    """Of the instructions as the model is asked: by the tokenizer's chat template, or under plain headings."""
    asked = [prompt_text(tokenizer, instruction) for instruction in instructions]
    return token_ids(tokenizer, asked, begun=not tokenizer.chat_template)


def response_ids(tokenizer: Any, instructions: list[str], responses: list[str]) -> list[list[int]]:
    """Of what the model has to answer, with what ends it."""
    answers = [_as_chat(tokenizer, *pair)[1] for pair in zip(instructions, responses, strict=True)]
    end = [] if tokenizer.chat_template else end_ids(tokenizer)
    return [ids + end for ids in token_ids(tokenizer, answers, begun=False)]


def end_ids(tokenizer: Any) -> list[int]:
    """What ends a text: one token or none."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def prompt_text(tokenizer: Any, instruction: str) -> str:
    """The text of a prompt, with the special tokens of a chat template spelt out."""
    return _as_chat(tokenizer, instruction, "")[0]


def _as_chat(tokenizer: Any, instruction: str, response: str) -> tuple[str, str]:
    """(what the model is given, what it has to answer)."""
    if not tokenizer.chat_template:
        return f"### Instruction:\n{instruction}\n\n### Response:\n", response
    asked = [{"role": "user", "content": instruction}]
    given = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": response}], tokenize=False)
    return given, whole[len(given) :] if whole.startswith(given) else response + (tokenizer.eos_token or "")


def token_ids(tokenizer: Any, texts: list[str], begun: bool) -> list[list[int]]:
    """`begun`: with the token that begins a text, where the tokenizer has one, and none that ends it."""
    found: list[list[int]] = tokenizer(texts, add_special_tokens=begun, return_attention_mask=False)["input_ids"]
    return [ids[:-1] if begun and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids for ids in found]


def _instructions(config: RunConfig, train: pd.DataFrame) -> tuple[str | None, str | None]:
    """The columns of instruction and response; of plain text neither."""
    if config.text_column:
        return None, None
    asked = config.instruction_column or config.response_column
    if not asked and not (known(train, INSTRUCTION_NAMES) and known(train, RESPONSE_NAMES)):
        return None, None
    return (
        named(config, train, "instruction_column", INSTRUCTION_NAMES),
        named(config, train, "response_column", RESPONSE_NAMES),
    )
