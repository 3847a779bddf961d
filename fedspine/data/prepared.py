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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from fedspine.config import RunConfig

FOLDER_VARIABLE = "FEDSPINE_PREPARED"
"""Names the folder with prepared data, for processes that are started from here."""


@dataclass(frozen=True)
class Texts:
    """Strings as UTF-8 in one array: string i is `data[offsets[i]:offsets[i + 1]]`."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, strings: Sequence[str]) -> Texts:
        parts = [string.encode() for string in strings]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), dtype=np.uint8), offsets)

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
            Texts.of(frame["text"].tolist()),
            Texts.of(frame["text_pair"].tolist()) if "text_pair" in frame else None,
            frame["label"].to_numpy(dtype=np.int64),
        )
        for frame in (task.train, task.test)
    )
    return PreparedData(train, test, partition_rows(task, config), task.classes)


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
    return PreparedData(rows("train"), rows("test"), owned, classes)


def _place(folder: str, settings: str) -> Path:
    return Path(folder) / f"{hashlib.sha256(settings.encode()).hexdigest()}.safetensors"


def _write(data: PreparedData, place: Path) -> None:
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, rows in (("train", data.train), ("test", data.test)):
        arrays[f"{name}-labels"] = rows.labels
        for part, texts in (("texts", rows.texts), ("pairs", rows.pairs)):
            if texts is not None:
                arrays |= {f"{name}-{part}": texts.data, f"{name}-{part}-offsets": texts.offsets}
    arrays["owned"] = np.concatenate(data.owned)
    arrays["counts"] = np.array([len(rows) for rows in data.owned])
    save_file(arrays, place, metadata={"classes": json.dumps(data.classes)})
