"""The personal data of a study: every user's history and held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.data.columns import TextTask
from fedspine.data.partition import partition_rows
from fedspine.data.prepared import PreparedData, Rows, Texts
from fedspine.data.task import load_task
from fedspine.errors import DataError
from fedspine.study.persona import FOLDERS, PERSONAS, persona_frame

PERSONA_ROWS = 1024
"""Of every user of a persona task: always as many, so that more examples are the same ones and others."""


@dataclass(frozen=True)
class PersonalTask:
    """A task before anybody's rows are chosen."""

    name: str
    classes: tuple[str, ...]
    frame: pd.DataFrame
    """Columns text, label (index into `classes`), perhaps text_pair."""
    pools: tuple[NDArray[np.int64], ...]
    """Rows of every user: held out are the first, the history is what follows."""

    def shortage(self, examples: int, test_examples: int) -> str:
        """Why there are not as many rows; empty when there are."""
        smallest = min(range(len(self.pools)), key=lambda user: len(self.pools[user]))
        have = len(self.pools[smallest])
        if examples + test_examples <= have:
            return ""
        return (
            f"examples = {examples}: user {smallest} of task '{self.name}' has {have} rows, {test_examples} of them "
            f"held out; use at most {max(0, have - test_examples)}, or fewer test_examples"
        )

    def class_numbers(self) -> NDArray[np.float64]:
        """The classes as numbers. Errors: `DataError` when one is none."""
        try:
            return np.array([float(each) for each in self.classes])
        except ValueError:
            raise DataError(
                f"metric = 'mae' needs classes that are numbers, and task '{self.name}' has "
                f"{', '.join(self.classes[:4])}; use metric = 'accuracy'"
            ) from None

    def data(self, examples: int, test_examples: int) -> tuple[PreparedData, tuple[NDArray[np.int64], ...]]:
        """(the data of a run, the rows of its test set by user).

        Errors: `DataError` when a user has fewer rows.
        """
        if shortage := self.shortage(examples, test_examples):
            raise DataError(shortage)
        history = [pool[test_examples : test_examples + examples] for pool in self.pools]
        held_out = [pool[:test_examples] for pool in self.pools]
        train, test = (self._rows(np.concatenate(parts)) for parts in (history, held_out))
        users = np.arange(len(self.pools))[:, None]
        owned = tuple(users * examples + np.arange(examples))
        return PreparedData(train, test, owned, self.classes), tuple(users * test_examples + np.arange(test_examples))

    def _rows(self, rows: NDArray[np.int64]) -> Rows:
        frame = self.frame.iloc[rows]
        pairs = Texts.of(frame["text_pair"].tolist()) if "text_pair" in frame else None
        return Rows(Texts.of(frame["text"].tolist()), pairs, frame["label"].to_numpy(dtype=np.int64))


def personal_task(name: str, tables: Mapping[str, Mapping[str, Any]], users: int, seed: int) -> PersonalTask:
    """A persona task, or one of the study's tables. A user's rows come in an order drawn by seed.

    A table means the training rows of its data only: a user's held-out rows are own ones too.
    Errors: `DataError`, `ConfigError` when the data cannot be read or dealt out.
    """
    if name in PERSONAS:
        frame = persona_frame(name, seed, users, PERSONA_ROWS)
        frame["label"] = frame["label"].map({folder: index for index, folder in enumerate(FOLDERS)})
        return PersonalTask(name, FOLDERS, frame, tuple(np.arange(users * PERSONA_ROWS).reshape(users, -1)))
    config = RunConfig.from_values({"min_classes": 1, **tables[name], "devices": users, "sampled": users, "seed": seed})
    task: TextTask = load_task(config)
    rows: Sequence[NDArray[np.int64]] = partition_rows(task, config)
    pools = tuple(np.random.default_rng([seed, 32, user]).permutation(mine) for user, mine in enumerate(rows))
    return PersonalTask(name, task.classes, task.train, pools)
