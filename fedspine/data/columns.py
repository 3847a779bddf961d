"""Columns of a data set: found by their usual names or named by the user, and refused when they are absent or empty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from fedspine.config import RunConfig
from fedspine.errors import DataError

LABEL_NAMES = ("label", "labels", "intent", "class", "category", "target", "sentiment", "coarse")


@dataclass(frozen=True)
class TextTask:
    """`train` and `test` have columns text (str), label (index into `classes`), perhaps text_pair, and the source's."""

    name: str
    classes: tuple[str, ...]
    train: pd.DataFrame
    test: pd.DataFrame


def named(config: RunConfig, frame: pd.DataFrame, key: str, usual: tuple[str, ...]) -> str:
    """The column that the configuration key `key` names, or else the first of the usual names.

    Errors: `DataError` when there is none.
    """
    wanted = getattr(config, key)
    found = wanted if wanted in frame else None if wanted else known(frame, usual)
    if found is None:
        absent = f"no column '{wanted}'" if wanted else f"no column named {', '.join(usual)}"
        raise DataError(
            f"data = '{config.data}': {absent}; it has {', '.join(map(str, frame.columns))}. Name it with {key}"
        )
    return str(found)


def optional(config: RunConfig, frame: pd.DataFrame, key: str, usual: tuple[str, ...]) -> str | None:
    """The same, or None when the key is empty and none of the usual names is there."""
    return named(config, frame, key, usual) if getattr(config, key) or known(frame, usual) else None


def known(frame: pd.DataFrame, usual: tuple[str, ...]) -> str | None:
    return next((name for name in usual if name in frame), None)


def check_filled(config: RunConfig, name: str, frame: pd.DataFrame, columns: Iterable[str | None]) -> pd.DataFrame:
    """The `name` rows, numbered anew. Errors: `DataError` when a column is absent or empty in some row."""
    for column in filter(None, columns):
        if column not in frame:
            raise DataError(
                f"data = '{config.data}': the {name} rows have no column '{column}'; "
                f"they have {', '.join(map(str, frame.columns))}"
            )
        empty = frame[column].isna() | (frame[column].astype(str).str.strip() == "")
        if empty.any():
            row = int(frame.index[empty.to_numpy().argmax()]) + 1
            raise DataError(f"data = '{config.data}': row {row} of the {name} rows has an empty '{column}'")
    return frame.reset_index(drop=True)
