"""A TOML file of the user's."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fedspine.errors import ConfigError


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Errors: `ConfigError`, which calls the file `what`, when it is absent, cannot be read, or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{what} {path} is not valid TOML: {error}") from None
