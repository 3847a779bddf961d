"""The app that a SuperLink sends to its devices: this very package, so that server and devices run the same code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.supercore.fab import Fab

import fedspine
from fedspine.config import RunConfig

COMPONENT = """from fedspine.flower.client_app import require_same_root
from fedspine.flower.deployed import {name} as app

require_same_root(__file__)
__all__ = ["app"]
"""
"""What `server/app.py` and `clients/app.py` of this project are too."""


def bundle(
    config: RunConfig,
    directory: Path,
    resume: bool,
    names: Iterable[str] = (),
    least: int = 0,
    nodes: dict[str, int] | None = None,
) -> Fab:
    """The package with a configuration as Flower's app bundle. The run goes into `directory`, or continues there.

    `names`: of all devices, where they are known; `least`: of them, that must be there at the start; 0: all. `nodes`:
    those that have the key of each, where devices have keys.
    """
    root = Path(fedspine.__file__).resolve().parent
    settings = {
        field.name: ",".join(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != ()
    }
    who = {
        key: value
        for key, value in (
            ("names", ",".join(names)),
            ("least", least),
            ("nodes", json.dumps(nodes) if nodes else ""),
        )
        if value
    }
    project = {
        "project": {"name": "fedspine", "version": fedspine.__version__},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedspine",
                    "components": {"serverapp": "server.app:app", "clientapp": "clients.app:app"},
                    "config": {**settings, "directory": str(directory), "resume": resume, **who},
                }
            }
        },
    }
    files: dict[str, bytes | Path] = {
        f"fedspine/{path.relative_to(root).as_posix()}": path for path in sorted(root.rglob("*.py"))
    }
    files["pyproject.toml"] = tomli_w.dumps(project).encode()
    for side, name in (("server", "server_app"), ("clients", "client_app")):
        files[f"{side}/__init__.py"] = b""
        files[f"{side}/app.py"] = COMPONENT.format(name=name).encode()
    content, _ = build_fab_from_files(files)
    return Fab(hashlib.sha256(content).hexdigest(), content, {})
