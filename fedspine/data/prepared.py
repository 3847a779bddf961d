"""The data as devices use it: texts, labels, and who has which rows. Made once per run.

The processes of one machine share it: the server writes it to a temporary folder, and its workers map those files into
memory instead of reading and dealing out the data again. Elsewhere it is made anew, with the same result. A device's
rows are tokenized when they are first wanted: most devices of a large federation never are.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from fedspine.config import RunConfig
from fedspine.errors import DataError
from fedspine.randomness import Purpose, generator

FOLDER_VARIABLE = "FEDSPINE_PREPARED"
"""Names the folder with prepared data, for processes that are started from here."""


@dataclass(frozen=True)
class Texts:
    """Strings as UTF-8 in one array: string i is `data[offsets[i]:offsets[i + 1]]`."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> Texts:
        data, offsets = bytearray(), array("q", [0])
        for string in strings:
            data += string.encode()
            offsets.append(len(data))
        return cls(np.frombuffer(data, dtype=np.uint8), np.frombuffer(offsets, dtype=np.int64))

    def take(self, rows: NDArray[np.int64]) -> list[str]:
        return [self.data[self.offsets[row] : self.offsets[row + 1]].tobytes().decode() for row in rows]


@dataclass(frozen=True)
class Rows:
    """Labelled texts, or pairs of them."""

    texts: Texts
    pairs: Texts | None
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class PreparedData:
    """Training and evaluation set, the rows of the training set by device, and the names of the classes."""

    train: Rows
    test: Rows
    owned: tuple[NDArray[np.int64], ...]
    classes: tuple[str, ...]
    public: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Rows of the training set that no device owns, for the server to distil on: their labels are not looked at."""


def prepare(config: RunConfig) -> PreparedData:
    """Read and deal out.

    Errors: `DataError`, `ConfigError`.
    """
    # Only here: a process that finds the data prepared is spared seconds of imports.
    from fedspine.data.partition import partition_rows
    from fedspine.data.task import load_task

    task = load_task(config)
    train, test = (
        Rows(
            Texts.of(frame["text"]),
            Texts.of(frame["text_pair"]) if "text_pair" in frame else None,
            frame["label"].to_numpy(dtype=np.int64),
        )
        for frame in (task.train, task.test)
    )
    public = _public_rows(config, len(train))
    if not len(public):
        return PreparedData(train, test, partition_rows(task, config), task.classes)
    rest = np.delete(np.arange(len(train)), public)
    owned = partition_rows(replace(task, train=task.train.iloc[rest].reset_index(drop=True)), config)
    return PreparedData(train, test, tuple(rest[rows] for rows in owned), task.classes, public)


def _public_rows(config: RunConfig, rows: int) -> NDArray[np.int64]:
    """Errors: `DataError` when fewer rows than devices would be left."""
    if not config.public_examples:
        return np.empty(0, np.int64)
    if config.public_examples > rows - config.devices:
        raise DataError(
            f"public_examples = {config.public_examples}: '{config.data}' has {rows} training rows and every one of "
            f"the {config.devices} devices needs one; at most {rows - config.devices} can be set aside"
        )
    rng = generator(config.seed, 0, 0, Purpose.PUBLIC_ROWS)
    return np.sort(rng.choice(rows, config.public_examples, replace=False))


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
    """The data that another process prepared for these settings, mapped into memory."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or not _place(folder, settings).is_file():
        return None
    with safe_open(_place(folder, settings), "pt") as file:  # torch's tensors are maps of the file, numpy's are copies
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        classes = tuple(json.loads(file.metadata()["classes"]))

    def rows(name: str) -> Rows:
        texts, pairs = (
            Texts(arrays[f"{name}-{part}"], arrays[f"{name}-{part}-offsets"]) if f"{name}-{part}" in arrays else None
            for part in ("texts", "pairs")
        )
        assert texts is not None
        return Rows(texts, pairs, arrays[f"{name}-labels"])

    owned = tuple(np.split(arrays["owned"], np.cumsum(arrays["counts"])[:-1]))
    return PreparedData(rows("train"), rows("test"), owned, classes, arrays["public"])


def _place(folder: str, settings: str) -> Path:
    return Path(folder) / f"{hashlib.sha256(settings.encode()).hexdigest()}.safetensors"


def _write(data: PreparedData, place: Path) -> None:
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, rows in (("train", data.train), ("test", data.test)):
        arrays[f"{name}-labels"] = rows.labels
        for part, texts in (("texts", rows.texts), ("pairs", rows.pairs)):
            if texts is not None:
                arrays |= {f"{name}-{part}": texts.data, f"{name}-{part}-offsets": texts.offsets}
    arrays["public"] = data.public
    arrays["owned"] = np.concatenate(data.owned)
    arrays["counts"] = np.array([len(rows) for rows in data.owned])
    save_file(arrays, place, metadata={"classes": json.dumps(data.classes)})
