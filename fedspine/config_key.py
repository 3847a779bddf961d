"""One key of a configuration: its meaning, and which values it takes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from typing import Any

from fedspine.errors import ConfigError

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """What a configuration key means and which values it takes."""

    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


def key_field(default: Any, help: str, *choices: str, min: float | None = None, max: float | None = None) -> Any:
    """A field of a configuration, with its default, meaning and bounds."""
    return dataclasses.field(default=default, metadata={"key": Key(help, choices, min, max)})


def checked(field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    """The value of a key, of its type. Errors: `ConfigError` for a wrong type, or a value out of bounds."""
    key: Key = field.metadata["key"]
    name = field.name
    if kind is tuple[str, ...] or kind == tuple[str, ...]:
        items = tuple(value.split(",")) if isinstance(value, str) else value
        words = isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items)
        if not words or (field.default and not items):
            raise ConfigError(f"{name} = {value!r}: must be a list of words, such as {toml_value(field.default)}")
        for item in items:
            if key.choices and item not in key.choices:
                raise ConfigError(f"{name} = {value!r}: '{item}' must be one of {', '.join(key.choices)}")
        return tuple(items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf if value > 0 else -math.inf
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{name} = {value!r}: must be {_KINDS[kind]}, such as {toml_value(field.default)}")
    if key.choices and value not in key.choices:
        near = difflib.get_close_matches(value, key.choices, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(key.choices)}{hint}")
    if key.minimum is not None and not value >= key.minimum:
        raise ConfigError(f"{name} = {value}: must be at least {key.minimum:g}")
    if key.maximum is not None and not value <= key.maximum:
        raise ConfigError(f"{name} = {value}: must be at most {key.maximum:g}")
    return value


def toml_value(value: Any) -> str:
    """As it stands in a TOML file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
