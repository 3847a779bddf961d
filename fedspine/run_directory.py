"""Where a run goes: a new directory, refused when something is in it, or that of a run that goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from fedspine.config import RunConfig, saved_config
from fedspine.errors import CheckpointError
from fedspine.report.records import write_atomically

DEVICES = "devices.json"
"""Names of a deployment's devices, in the order of their numbers."""


def free_directory(out: str | Path | None, name: str, resumable: bool = True) -> Path:
    """`out`, or `runs/NAME-DATE-TIME`; nothing is made yet.

    Errors: `CheckpointError` when it is in use or cannot be written; it points to --resume when the run is `resumable`.
    """
    directory = Path(out) if out is not None else Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        follow = f", or --resume {directory} to continue it" if resumable else ""
        raise CheckpointError(f"--out {directory}: already in use; choose another directory{follow}")
    parent = _existing_parent(directory)
    if not parent.is_dir():
        raise CheckpointError(f"--out {directory}: {parent} is a file; choose another directory")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"--out {directory}: no permission to write there")
    return directory


def resumed_config(directory: Path) -> RunConfig:
    """Of a run's directory. Errors: `CheckpointError` when it is none."""
    if not directory.is_dir():
        raise CheckpointError(f"--resume {directory}: there is no such directory")
    if not (directory / "config.toml").is_file():
        raise CheckpointError(f"--resume {directory}: it holds no config.toml, so it is no run directory")
    return saved_config(directory)


def write_names(directory: Path, names: Iterable[str]) -> None:
    """Of a run's devices, by number."""
    write_atomically(directory / DEVICES, (json.dumps(list(names)) + "\n").encode())


def first_names(directory: Path, names: Sequence[str]) -> list[str]:
    """Of a run's devices, by number, as they were when it began; `names` where nothing was written yet.

    `names`: those of now, in any order; none where they are not known.
    Errors: `CheckpointError` when these are others.
    """
    path = directory / DEVICES
    if not path.is_file():
        return list(names)
    try:
        first: list[str] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it was edited; restore it") from None
    gone, new = sorted(set(first) - set(names)), sorted(set(names) - set(first))
    if names and (gone or new):
        raise CheckpointError(
            f"--resume {directory}: the run began with the devices {', '.join(first)}; missing now: "
            f"{', '.join(gone) or 'none'}; new: {', '.join(new) or 'none'}; let --certificates hold a NAME.pub of each "
            "that it began with, and no other, or start a new run with --out"
        )
    return first


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
