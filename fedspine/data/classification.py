"""Texts, or pairs of texts, with a class each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fedspine.config import RunConfig
from fedspine.data.columns import LABEL_NAMES, TextTask, check_filled, named
from fedspine.errors import DataError

TEXT_NAMES = ("text", "sentence", "sentence1", "premise", "question", "utterance", "review", "content")
PAIR_NAMES = {"sentence1": ("sentence2",), "premise": ("hypothesis",), "question": ("sentence", "question2")}
PAIR_FIRST = ("sentence1", "premise", "question")


def classification_task(config: RunConfig, train: pd.DataFrame, test: pd.DataFrame) -> TextTask:
    """Text, or a pair of texts, and label.

    Errors: `DataError` for a missing column, an empty value, a single class, or a label that only the evaluation has.
    """
    label = named(config, train, "label_column", LABEL_NAMES)
    text, pair = _text_columns(train, config)
    columns = (label, text, pair)
    frames = check_filled(config, "train", train, columns), check_filled(config, "evaluation", test, columns)
    values = config.classes or class_names(frames[0][label])
    if len(values) < 2:
        raise DataError(
            f"data = '{config.data}': column '{label}' has only one class, '{values[0]}'; two or more are needed"
        )
    index = {value: number for number, value in enumerate(values)}
    strange = set(frames[0][label].astype(str)) - set(values)
    if strange:
        raise DataError(
            f"data = '{config.data}': its rows have the label '{sorted(strange)[0]}', which is not one of the run's "
            f"{len(values)} classes: {', '.join(values[:8])}; rename the label, or leave these rows out"
        )
    unknown = set(frames[1][label].astype(str)) - set(values)
    if unknown:
        raise DataError(
            f"data = '{config.data}': the evaluation rows have the label '{sorted(unknown)[0]}', which the training "
            f"rows do not ({len(values)} classes: {', '.join(values[:8])}); the model's head would not fit"
        )
    done = []
    for frame in frames:
        kept = frame.drop(columns=[c for c in ("text", "text_pair", "label") if c in frame])
        kept = kept.assign(label=frame[label].astype(str).map(index).astype(np.int64), text=frame[text].astype(str))
        done.append(kept.assign(text_pair=frame[pair].astype(str)) if pair else kept)
    return TextTask(Path(config.data).name, values, done[0], done[1])


def class_names(labels: pd.Series) -> tuple[str, ...]:
    """Sorted, as numbers where all are."""
    values = labels.astype(str).unique().tolist()
    if all(value.lstrip("-").isdigit() for value in values):
        return tuple(sorted(values, key=int))
    return tuple(sorted(values))


def _text_columns(frame: pd.DataFrame, config: RunConfig) -> tuple[str, str | None]:
    if config.text_column:
        text = named(config, frame, "text_column", TEXT_NAMES)
    else:
        text = next((c for c in PAIR_FIRST if c in frame and any(p in frame for p in PAIR_NAMES[c])), "")
        text = text or named(config, frame, "text_column", TEXT_NAMES)
    if config.text_pair_column:
        return text, named(config, frame, "text_pair_column", ())
    pair = None if config.text_column else next((p for p in PAIR_NAMES.get(text, ()) if p in frame), None)
    return text, pair
