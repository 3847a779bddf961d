"""The personal data of a study: every user's history and held-out rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.data.columns import TextTask, check_filled
from fedspine.data.lamp import QUERY, is_lamp, lamp_users
from fedspine.data.partition import partition_rows
from fedspine.data.prepared import PreparedData, Rows, Texts
from fedspine.data.task import load_task
from fedspine.errors import ConfigError, DataError
from fedspine.study.design import LANGUAGE
from fedspine.study.persona import FOLDERS, PERSONAS, persona_frame

PERSONA_ROWS = 1024
"""Of every user of a persona task: always as many, so that more examples are the same ones and others."""


@dataclass(frozen=True)
class PersonalTask:
    """A task before anybody's rows are chosen."""

    name: str
    classes: tuple[str, ...]
    frame: pd.DataFrame
    """Columns text, label (index into `classes`), perhaps text_pair, perhaps what stands for the text in retrieval."""
    pools: tuple[NDArray[np.int64], ...]
    """Rows of every user: held out are the first, the history is what follows."""
    kind: str = RunConfig.task
    """As the configuration key `task`."""
    questions: int = 0
    """Rows of a user that can be held out, where the data say so; 0: any."""

    @property
    def language(self) -> bool:
        return self.kind == LANGUAGE

    @property
    def has_responses(self) -> bool:
        """Whether a language model answers instructions, and does not continue texts."""
        return self.language and "text_pair" in self.frame

    def of_user(self, user: int, examples: int, test_examples: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(history, held-out rows)"""
        pool = self.pools[user]
        return self.frame.iloc[pool[test_examples : test_examples + examples]], self.frame.iloc[pool[:test_examples]]

    def check_held_out(self, test_examples: int) -> None:
        """Errors: `DataError` when the data have another number of questions per user."""
        if self.questions and test_examples != self.questions:
            raise DataError(
                f"test_examples = {test_examples}: every user of task '{self.name}' has {self.questions} question; "
                f"set test_examples = {self.questions}"
            )

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
        parts = [self.of_user(user, examples, test_examples) for user in range(len(self.pools))]
        train, test = (_rows(pd.concat(frames)) for frames in zip(*parts, strict=True))
        users = np.arange(len(self.pools))[:, None]
        owned = tuple(users * examples + np.arange(examples))
        return PreparedData(train, test, owned, self.classes), tuple(users * test_examples + np.arange(test_examples))

    def queries(self, frame: pd.DataFrame, whole: bool) -> list[str]:
        """What retrieval compares: of the `whole` rows of a history, or of what is given of a held-out one."""
        if QUERY in frame:
            return list(frame[QUERY])
        texts = list(frame["text"])
        return texts if whole or not self.language or self.has_responses else [halves(text)[0] for text in texts]


def halves(text: str) -> tuple[str, str]:
    """A plain text, cut after half of its words: what a language model is given, and what it has to continue with."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    cut = ends[max(1, len(ends) // 2) - 1]
    return text[:cut], text[cut:]


def _rows(frame: pd.DataFrame) -> Rows:
    pairs = Texts.of(frame["text_pair"].tolist()) if "text_pair" in frame else None
    return Rows(Texts.of(frame["text"].tolist()), pairs, frame["label"].to_numpy(dtype=np.int64))


def personal_task(name: str, tables: Mapping[str, Mapping[str, Any]], users: int, seed: int) -> PersonalTask:
    """A persona task, or one of the study's tables. A user's rows come in an order drawn by seed.

    A table means the training rows of its data only: a user's held-out rows are own ones too. Plain texts of a single
    word leave nothing to continue with, and are left out.
    Errors: `DataError`, `ConfigError` when the data cannot be read or dealt out.
    """
    if name in PERSONAS:
        frame = persona_frame(name, seed, users, PERSONA_ROWS)
        frame["label"] = frame["label"].map({folder: index for index, folder in enumerate(FOLDERS)})
        return PersonalTask(name, FOLDERS, frame, tuple(np.arange(users * PERSONA_ROWS).reshape(users, -1)))
    keys = dict(tables[name])
    owner = keys.pop("user_column", "")
    if owner:
        keys["partition"] = f"column:{owner}"
    config = RunConfig.from_values({"min_classes": 1, **keys, "devices": users, "sampled": users, "seed": seed})
    if is_lamp(config.data):
        if more := ", ".join(sorted(tables[name].keys() - {"data", "task"})):
            raise ConfigError(f"[tasks.{name}]: {more}: files of LaMP say that themselves; leave it out")
        classes, parts = lamp_users(Path(config.data), users, config.task == LANGUAGE)
        first = np.cumsum([0, *map(len, parts)])[:-1]
        pools = tuple(
            start + np.concatenate([[0], 1 + _order(seed, user, len(part) - 1)])
            for user, (start, part) in enumerate(zip(first, parts, strict=True))
        )
        return PersonalTask(name, classes, pd.concat(parts, ignore_index=True), pools, config.task, questions=1)
    task: TextTask = load_task(config)
    if config.task == LANGUAGE and "text_pair" not in task.train:
        task = _only(task, task.train["text"].str.split().str.len() > 1)
    if owner:
        task = _only(task, _of_most_active(name, config, task.train, owner, users))
    rows: Sequence[NDArray[np.int64]] = partition_rows(task, config)
    pools = tuple(mine[_order(seed, user, len(mine))] for user, mine in enumerate(rows))
    return PersonalTask(name, task.classes, task.train, pools, config.task)


def _order(seed: int, user: int, rows: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 32, user]).permutation(rows)


def _only(task: TextTask, kept: pd.Series) -> TextTask:
    return replace(task, train=task.train[kept].reset_index(drop=True))


def _of_most_active(name: str, config: RunConfig, frame: pd.DataFrame, owner: str, users: int) -> pd.Series:
    """Which rows are of the users with the most rows: the same in every seed, so that seeds differ in rows alone.

    Errors: `DataError` without the column, for rows of nobody, or with fewer users.
    """
    if owner not in frame:
        raise DataError(
            f"[tasks.{name}] user_column = '{owner}': no such column in the data; it has "
            f"{', '.join(map(str, frame.columns))}"
        )
    owners = check_filled(config, "training", frame, (owner,))[owner].astype(str)
    counts = owners.value_counts()
    if len(counts) < users:
        raise DataError(f"users = {users}: column '{owner}' of task '{name}' names {len(counts)}; use at most as many")
    most = sorted(counts.index, key=lambda value: (-counts[value], value))[:users]
    return owners.isin(most)
