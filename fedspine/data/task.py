"""A classification task as two tables: from the grammar, from files, or from the Hugging Face hub."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedspine.config import RunConfig
from fedspine.data.embedded import embedded_task_frames
from fedspine.errors import DataError

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("dev", "validation", "val", "valid", "test")
LABEL_NAMES = ("label", "labels", "intent", "class", "category", "target", "sentiment", "coarse")
TEXT_NAMES = ("text", "sentence", "sentence1", "premise", "question", "utterance", "review", "content")
PAIR_NAMES = {"sentence1": ("sentence2",), "premise": ("hypothesis",), "question": ("sentence", "question2")}
PAIR_FIRST = ("sentence1", "premise", "question")


@dataclass(frozen=True)
class TextTask:
    """`train` and `test` have columns text (str), label (index into `classes`), perhaps text_pair, and the source's."""

    name: str
    classes: tuple[str, ...]
    train: pd.DataFrame
    test: pd.DataFrame


def load_task(config: RunConfig) -> TextTask:
    """The configured task.

    Errors: `DataError` for a missing file, column, label or text, a single class, or fewer rows than devices.
    """
    if config.data == "embedded":
        classes, train, test = embedded_task_frames(config.seed, config.devices)
        task = TextTask("embedded", classes, train, test)
    else:
        path = _existing(config.data)
        train, test = _from_path(path, config) if path else _from_hub(config)
        task = _labelled(config, train, test)
    if config.eval_examples and config.eval_examples < len(task.test):
        rows = np.sort(np.random.default_rng([config.seed, 11]).permutation(len(task.test))[: config.eval_examples])
        task = TextTask(task.name, task.classes, task.train, task.test.iloc[rows].reset_index(drop=True))
    if len(task.train) < config.devices:
        raise DataError(
            f"devices = {config.devices}: '{config.data}' has only {len(task.train)} training rows; "
            "use at most one device per row"
        )
    return task


def _existing(data: str) -> Path | None:
    try:
        path = Path(data).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long a name, or the home of an unknown user
        return None


def _from_path(path: Path, config: RunConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    if path.is_file():
        frame = _read(path)
        if len(frame) < 2:
            raise DataError(f"data = '{path}': one row cannot be split into training and evaluation rows")
        label = _column(frame, "label_column", config.label_column, LABEL_NAMES, config)
        order = np.random.default_rng([config.seed, 12]).permutation(len(frame))
        again = frame[label].astype(str).iloc[order].duplicated().to_numpy()
        order = np.concatenate([order[again], order[~again]])  # one row of every class stays for training
        cut = max(1, len(frame) // 10)
        return frame.iloc[np.sort(order[cut:])], frame.iloc[np.sort(order[:cut])]
    train = _find(path, TRAIN_NAMES, config)
    test = _find(path, TEST_NAMES, config)
    for what, found, names in (("training", train, TRAIN_NAMES), ("evaluation", test, TEST_NAMES)):
        if found is None:
            raise DataError(
                f"data = '{path}': no {what} file; expected one of {', '.join(names)} with an ending of "
                f"{', '.join(SUFFIXES)}"
            )
    return train, test


def _find(folder: Path, names: tuple[str, ...], config: RunConfig) -> pd.DataFrame | None:
    """The first file of these names that has labels; a file without any is no evaluation set."""
    first = None
    for name in names:
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                frame = _read(path)
                if config.label_column in frame or _known(frame, LABEL_NAMES):
                    return frame
                first = first if first is not None else frame
    return first


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".tsv":
            frame = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, dtype=str)
        elif path.suffix == ".csv":
            frame = pd.read_csv(path, keep_default_na=False, dtype=str)
        elif path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        elif path.suffix in (".json", ".jsonl"):
            frame = pd.read_json(path, lines=path.suffix == ".jsonl", dtype=False)
        else:
            raise DataError(f"data = '{path}': unknown ending '{path.suffix}'; use one of {', '.join(SUFFIXES)}")
    except (ValueError, OSError) as error:
        raise DataError(f"data = '{path}' cannot be read: {' '.join(str(error).split())[:200]}") from None
    if frame.empty:
        raise DataError(f"data = '{path}': it holds no rows")
    if path.suffix in (".tsv", ".csv") and not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"data = '{path}': its rows have more fields than its first line names")
    return frame.reset_index(drop=True)


def _from_hub(config: RunConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    if config.data.startswith((".", "/", "~")) or Path(config.data).suffix in SUFFIXES:
        raise DataError(f"data = '{config.data}': there is no such file or folder")
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns at every retry
    try:
        loaded: Any = datasets.load_dataset(config.data)
    except Exception as error:  # the hub client raises many kinds; all mean that it cannot be had
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data = '{config.data}': no such file or folder, and it cannot be loaded from the hub: {reason}"
        ) from None
    splits = {name: part.to_pandas() for name, part in loaded.items()}
    train = next((splits[name] for name in TRAIN_NAMES if name in splits), None)
    test = next((splits[name] for name in TEST_NAMES if name in splits), None)
    if train is None or test is None:
        raise DataError(f"data = '{config.data}': it has splits {', '.join(splits)}; train and validation are needed")
    return train, test


def _labelled(config: RunConfig, train: pd.DataFrame, test: pd.DataFrame) -> TextTask:
    label = _column(train, "label_column", config.label_column, LABEL_NAMES, config)
    text, pair = _text_columns(train, config)
    frames = []
    for name, frame in (("train", train), ("evaluation", test)):
        for column in filter(None, (label, text, pair)):
            if column not in frame:
                raise DataError(
                    f"data = '{config.data}': the {name} rows have no column '{column}'; "
                    f"they have {', '.join(map(str, frame.columns))}"
                )
            empty = frame[column].isna() | (frame[column].astype(str).str.strip() == "")
            if empty.any():
                row = int(frame.index[empty.to_numpy().argmax()]) + 1
                raise DataError(f"data = '{config.data}': row {row} of the {name} rows has an empty '{column}'")
        frames.append(frame.reset_index(drop=True))
    values = _class_names(frames[0][label])
    if len(values) < 2:
        raise DataError(
            f"data = '{config.data}': column '{label}' has only one class, '{values[0]}'; two or more are needed"
        )
    index = {value: number for number, value in enumerate(values)}
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


def _class_names(labels: pd.Series) -> tuple[str, ...]:
    values = labels.astype(str).unique().tolist()
    if all(value.lstrip("-").isdigit() for value in values):
        return tuple(sorted(values, key=int))
    return tuple(sorted(values))


def _text_columns(frame: pd.DataFrame, config: RunConfig) -> tuple[str, str | None]:
    if config.text_column:
        text = _column(frame, "text_column", config.text_column, TEXT_NAMES, config)
    else:
        text = next((c for c in PAIR_FIRST if c in frame and any(p in frame for p in PAIR_NAMES[c])), "")
        text = text or _column(frame, "text_column", "", TEXT_NAMES, config)
    if config.text_pair_column:
        return text, _column(frame, "text_pair_column", config.text_pair_column, (), config)
    pair = None if config.text_column else next((p for p in PAIR_NAMES.get(text, ()) if p in frame), None)
    return text, pair


def _column(frame: pd.DataFrame, key: str, named: str, usual: tuple[str, ...], config: RunConfig) -> str:
    found = named if named in frame else None if named else _known(frame, usual)
    if found is None:
        wanted = f"no column '{named}'" if named else f"no column named {', '.join(usual)}"
        raise DataError(
            f"data = '{config.data}': {wanted}; it has {', '.join(map(str, frame.columns))}. Name it with {key}"
        )
    return found


def _known(frame: pd.DataFrame, usual: tuple[str, ...]) -> str | None:
    return next((name for name in usual if name in frame), None)
