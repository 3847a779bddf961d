"""What the models of a comparison cost when they answer: measured, each against the baseline's in alternation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspine.errors import FederationError
from fedspine.report.records import write_atomically


def measure_inference(runs: Mapping[str, Path], models: Path, baseline: str, length: int) -> dict[str, dict[str, Any]]:
    """`BenchResult.ratios` of every method's global model over that of `baseline`, by method, without the baseline.

    `runs`: directory of a finished run by method. Models go to `models`/NAME, figures beside them, by the model that
    they compare with; what is there is not made again, unless the run was. `length`: tokens of a text.
    Errors: `FederationError` with what `fedspine export` or `bench` said.
    """
    found = {}
    folders = {method: models / run.name for method, run in runs.items()}
    for method, run in runs.items():
        if _older(folders[method], run / "summary.json"):
            shutil.rmtree(folders[method], ignore_errors=True)
            _fedspine("export", run, "--merge", "--out", folders[method])
    for method, folder in folders.items():
        if method == baseline:
            continue
        path = folder.with_name(f"{folder.name}-against-{folders[baseline].name}.json")
        if _older(path, folder) or _older(path, folders[baseline]):
            text = _fedspine("bench", folder, "--against", folders[baseline], "--length", length, "--json")
            write_atomically(path, text.encode())
        found[method] = json.loads(path.read_text(encoding="utf-8"))["ratios"]
    return found


def _older(path: Path, than: Path) -> bool:
    """Whether it was not made yet, or from something older."""
    return not path.exists() or path.stat().st_mtime < than.stat().st_mtime


def _fedspine(*arguments: object) -> str:
    """What a command prints, in a process of its own."""
    command = [sys.executable, "-m", "fedspine", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FederationError(
            f"{arguments[0]} {arguments[1]}: {done.stderr.strip().removeprefix('fedspine: error: ')[-2000:]}"
        )
    return done.stdout
