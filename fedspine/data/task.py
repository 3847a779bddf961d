"""A task as two tables: from the grammar, from files, or from the Hugging Face hub."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedspine.config import RunConfig
from fedspine.data.classification import classification_task
from fedspine.data.columns import LABEL_NAMES, TextTask, known, named
from fedspine.data.embedded import embedded_task_frames
from fedspine.data.language import language_task
from fedspine.errors import DataError

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("dev", "validation", "val", "valid", "test")
TASKS = {"classification": classification_task, "causal-lm": language_task}
"""By the value of the configuration key `task`: what makes the task of two tables."""


def load_task(config: RunConfig) -> TextTask:
    """The configured task.

    Errors: `DataError` for a missing file, column, label or text, a single class, or fewer rows than devices.
    """
    if config.data == "embedded":
        if config.task != "classification":
            raise DataError(
                f"task = '{config.task}': the embedded data are sentences with a class; name texts or instructions "
                "with data = FILE, FOLDER or hub name"
            )
        classes, train, test = embedded_task_frames(config.seed, config.devices)
        task = TextTask("embedded", classes, train, test)
    else:
        path = _existing(config.data)
        train, test = _from_path(path, config) if path else _from_hub(config)
        task = TASKS[config.task](config, train, test)
    if config.eval_examples and config.eval_examples < len(task.test):
        rows = np.sort(np.random.default_rng([config.seed, 11]).permutation(len(task.test))[: config.eval_examples])
        task = TextTask(task.name, task.classes, task.train, task.test.iloc[rows].reset_index(drop=True))
    if len(task.train) < config.devices and config.partition != "all":
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
        return _split(_read(path), config)
    train = _find(path, TRAIN_NAMES, config)
    test = _find(path, TEST_NAMES, config)
    for what, found, names in (("training", train, TRAIN_NAMES), ("evaluation", test, TEST_NAMES)):
        if found is None:
            raise DataError(
                f"data = '{path}': no {what} file; expected one of {', '.join(names)} with an ending of "
                f"{', '.join(SUFFIXES)}"
            )
    return train, test


def _split(frame: pd.DataFrame, config: RunConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Nine tenths for training, drawn by seed; of every class one row at least."""
    if len(frame) < 2:
        raise DataError(f"data = '{config.data}': one row cannot be split into training and evaluation rows")
    order = np.random.default_rng([config.seed, 12]).permutation(len(frame))
    if config.task == "classification":
        label = named(config, frame, "label_column", LABEL_NAMES)
        again = frame[label].astype(str).iloc[order].duplicated().to_numpy()
        order = np.concatenate([order[again], order[~again]])
    cut = max(1, len(frame) // 10)
    return frame.iloc[np.sort(order[cut:])], frame.iloc[np.sort(order[:cut])]


def _find(folder: Path, names: tuple[str, ...], config: RunConfig) -> pd.DataFrame | None:
    """The first file of these names that has labels; a file without any is no evaluation set."""
    first = None
    for name in names:
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                frame = _read(path)
                if config.task != "classification" or config.label_column in frame or known(frame, LABEL_NAMES):
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
    if train is not None and test is None and config.task == "causal-lm":  # as most sets of instructions are
        return _split(train, config)
    if train is None or test is None:
        raise DataError(f"data = '{config.data}': it has splits {', '.join(splits)}; train and validation are needed")
    return train, test
