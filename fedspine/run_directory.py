"""Where a run goes: a new directory, refused when something is in it, or that of a run that goes on."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from fedspine.config import RunConfig, load_config
from fedspine.errors import CheckpointError


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
    return load_config(directory / "config.toml", {})


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
