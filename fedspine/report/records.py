"""`rounds.jsonl`: one line per round. What does not repeat between machines stands under keys named `wall`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from fedspine.errors import CheckpointError
from fedspine.types import Action, Probe, Pull, Report, RoundRecord


def record_to_line(record: RoundRecord) -> str:
    """One JSON line, floats exact."""
    return json.dumps(_to_json(record), separators=(",", ":"))


def record_from_line(line: str) -> RoundRecord:
    """The inverse of `record_to_line`."""
    values = json.loads(line)
    values["pulls"] = tuple(pull_of(pull) for pull in values["pulls"])
    values["roll_call"] = {int(device): Probe(**probe) for device, probe in values.get("roll_call", {}).items()}
    values |= {key: tuple(values.get(key, ())) for key in ("away", "discarded")}
    return RoundRecord(**values)


def reproducible(line: dict[str, Any]) -> dict[str, Any]:
    """A parsed record without its `wall` parts: equal for equal configurations."""
    return {key: _stripped(value) for key, value in line.items() if key != "wall"}


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside and rename: a crash leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append_record(path: Path, record: RoundRecord) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(record_to_line(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[RoundRecord]:
    """All whole records; a last line that was torn by a crash is left out.

    Errors: `CheckpointError` for a line that is no record.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(record_from_line(line.decode()))
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}: line {number} is no record of a round: it was edited") from None
    return records


def truncate_records(path: Path, count: int) -> None:
    """Keep the first `count` records."""
    kept = read_records(path)[:count]
    write_atomically(path, "".join(record_to_line(record) + "\n" for record in kept).encode())


def _to_json(record: RoundRecord) -> dict[str, Any]:
    return dataclasses.asdict(record)


def pull_of(values: dict[str, Any]) -> Pull:
    """The inverse of `dataclasses.asdict` of a pull."""
    probe, report = values["probe"], values["report"]
    salience = tuple(report.get("module_salience", ()))
    return Pull(
        **{
            **values,
            "action": Action(**values["action"]),
            "report": Report(**{**report, "module_salience": salience}),
            "probe": Probe(**probe) if probe else None,
        }
    )


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return reproducible(value)
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value
