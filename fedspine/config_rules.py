"""Values of several keys that do not go together, beside those that config.py checks itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedspine.errors import ConfigError

if TYPE_CHECKING:
    from fedspine.config import RunConfig


def check_levers(config: RunConfig) -> None:
    """Errors: `ConfigError` for a lever beyond the paper where it has no meaning."""
    if config.logit_adjustment and config.task != "classification":
        raise ConfigError(
            f"logit_adjustment = {config.logit_adjustment:g}: task = '{config.task}' has no classes; set it to 0"
        )
