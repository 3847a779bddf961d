"""The data as devices use it: token ids, labels, and who has which rows. Made once per run.

The processes of one machine share it: the server writes it to a temporary folder, and its workers map those files into
memory instead of reading, dealing out and tokenizing the data again. Elsewhere it is made anew, with the same result.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.data.encode import Encoded, encode

FOLDER_VARIABLE = "FEDSPINE_PREPARED"
"""Names the folder with prepared data, for processes that are started from here."""


@dataclass(frozen=True)
class PreparedData:
    """Training and evaluation set, the rows of the training set by device, and the names of the classes."""

    train: Encoded
    test: Encoded
    rows: tuple[NDArray[np.int64], ...]
    classes: tuple[str, ...]


def prepare(config: RunConfig, tokenizer: Any) -> PreparedData:
    """Read, deal out and tokenize.

    Errors: `DataError`, `ConfigError`.
    """
    # Only here: a process that finds the data prepared is spared seconds of imports.
    from fedspine.data.partition import partition_rows
    from fedspine.data.task import load_task

    task = load_task(config)
    rows = partition_rows(task, config)
    train, test = (encode(tokenizer, frame, config.max_length) for frame in (task.train, task.test))
    return PreparedData(train, test, rows, task.classes)


@contextmanager
def shared(data: PreparedData, settings: str) -> Iterator[None]:
    """Let processes that are started meanwhile find the data of these settings."""
    with tempfile.TemporaryDirectory(prefix="fedspine-") as folder:
        _write(data, _place(folder, settings))
        before = os.environ.get(FOLDER_VARIABLE)
        os.environ[FOLDER_VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[FOLDER_VARIABLE]
            else:
                os.environ[FOLDER_VARIABLE] = before


def find(settings: str) -> PreparedData | None:
    """The data that another process prepared for these settings, mapped into memory and read-only."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or not _place(folder, settings).is_dir():
        return None
    place = _place(folder, settings)

    def read(name: str) -> NDArray[np.int64]:
        array: NDArray[np.int64] = np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return array

    def encoded(name: str) -> Encoded:
        types = read(f"{name}-types") if (place / f"{name}-types.npy").exists() else None
        return Encoded(read(f"{name}-ids"), read(f"{name}-offsets"), types, read(f"{name}-labels"))

    rows = tuple(np.split(read("rows"), np.cumsum(read("counts"))[:-1]))
    classes = tuple(json.loads((place / "classes.json").read_text(encoding="utf-8")))
    return PreparedData(encoded("train"), encoded("test"), rows, classes)


def _place(folder: str, settings: str) -> Path:
    return Path(folder) / hashlib.sha256(settings.encode()).hexdigest()


def _write(data: PreparedData, place: Path) -> None:
    place.mkdir()
    for name, part in (("train", data.train), ("test", data.test)):
        np.save(place / f"{name}-ids.npy", part.ids)
        np.save(place / f"{name}-offsets.npy", part.offsets)
        np.save(place / f"{name}-labels.npy", part.labels)
        if part.types is not None:
            np.save(place / f"{name}-types.npy", part.types)
    np.save(place / "rows.npy", np.concatenate(data.rows))
    np.save(place / "counts.npy", np.array([len(rows) for rows in data.rows]))
    (place / "classes.json").write_text(json.dumps(data.classes), encoding="utf-8")
