"""A device catalogue as a TOML file (its keys: `population.py`): read with every value checked, and written."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from fedspine.devices.profiles import DeviceType, Population
from fedspine.errors import PopulationError

_NO_KEYS = {"types", "perturbation", "rounds", "drawn", "traces", "availability"}


def parse_catalogue(name: str, text: str) -> Population:
    """Errors: `PopulationError` names the field, the value and the bound."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PopulationError(f"population = '{name}': not valid TOML: {error}") from None
    kinds = values.pop("types", [])
    if not isinstance(kinds, list) or not kinds:
        raise PopulationError(f"population = '{name}': needs at least one [[types]] table")
    types = tuple(_device_type(f"population '{name}', types[{i}]", kind) for i, kind in enumerate(kinds))
    where = f"population '{name}'"
    _known(where, values, set(Population.__dataclass_fields__) - _NO_KEYS)
    own = "download_mbps" not in values and all(kind.download_mbps for kind in types)
    down = () if own else _numbers(where, values, "download_mbps")
    up = () if own else _numbers(where, values, "upload_mbps")
    if len(down) != len(up):
        raise PopulationError(f"{where}: download_mbps has {len(down)} groups, upload_mbps {len(up)}; make them equal")
    shuffled = values.get("shuffled", True)
    if not isinstance(shuffled, bool):
        raise PopulationError(f"{where}: shuffled = {shuffled!r} must be true or false")
    return Population(
        types,
        down,
        up,
        bandwidth_sigma=_number(where, values, "bandwidth_sigma", 0.3, zero=True),
        mode_rounds=_whole(where, values, "mode_rounds", 20),
        jitter=_number(where, values, "jitter", 0.05, zero=True),
        latency_ms=_number(where, values, "latency_ms", 20.0, zero=True),
        shuffled=shuffled,
    )


def catalogue_text(
    comment: str, settings: Mapping[str, object], kinds: Sequence[DeviceType], notes: Sequence[str]
) -> str:
    """The file of these types, each with a note, and of keys of the population."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"{key} = {_toml(value)}" for key, value in settings.items()]
    for kind, note in zip(kinds, notes, strict=True):
        lines += ["", f"[[types]]  # {note}"]
        values = {key: getattr(kind, key) for key in DeviceType.__dataclass_fields__}
        lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _device_type(where: str, values: Any) -> DeviceType:
    if not isinstance(values, dict):
        raise PopulationError(f"{where}: must be a table")
    _known(where, values, set(DeviceType.__dataclass_fields__))
    if not isinstance(values.get("name"), str):
        raise PopulationError(f"{where}: name is missing or no text")
    where = f"{where} ({values['name']})"
    if ("download_mbps" in values) != ("upload_mbps" in values):
        raise PopulationError(f"{where}: a link of its own needs both download_mbps and upload_mbps")
    own = {key: _number(where, values, key) for key in ("download_mbps", "upload_mbps") if key in values}
    noise = ("jitter", "bandwidth_sigma", "latency_ms")
    own |= {key: _number(where, values, key, zero=True) for key in noise if key in values}
    return DeviceType(
        values["name"],
        _whole(where, values, "count"),
        _number(where, values, "gflops"),
        _numbers(where, values, "modes") if "modes" in values else (1.0,),
        _number(where, values, "memory_mb"),
        _number(where, values, "iteration_ms", 3.0, zero=True),
        **own,
    )


def _known(where: str, values: dict[str, Any], names: set[str]) -> None:
    for key in values:
        if key not in names:
            raise PopulationError(f"{where}: unknown key '{key}'; it takes {', '.join(sorted(names))}")


def _number(where: str, values: dict[str, Any], key: str, default: float | None = None, zero: bool = False) -> float:
    value = values.get(key, default)
    if value is None:
        raise PopulationError(f"{where}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PopulationError(f"{where}: {key} = {value!r} must be a number")
    if not math.isfinite(value):
        raise PopulationError(f"{where}: {key} = {value} must be finite")
    if value < 0 or (value == 0 and not zero):
        raise PopulationError(f"{where}: {key} = {value} must be {'at least' if zero else 'above'} 0")
    return float(value)


def _whole(where: str, values: dict[str, Any], key: str, default: int | None = None) -> int:
    value = _number(where, values, key, default)
    if value != int(value):
        raise PopulationError(f"{where}: {key} = {value} must be a whole number")
    return int(value)


def _numbers(where: str, values: dict[str, Any], key: str) -> tuple[float, ...]:
    given = values.get(key)
    if not isinstance(given, list) or not given:
        raise PopulationError(f"{where}: {key} must be a list of numbers, such as [10, 4]")
    return tuple(_number(where, {key: value}, key) for value in given)
