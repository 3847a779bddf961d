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
    if config.distill_steps and config.task != "classification":
        raise ConfigError(
            f"distill_steps = {config.distill_steps}: task = '{config.task}' has no logits of few classes; set it to 0"
        )
    if config.close_at < 1 and config.trained_factors == "alternate":
        raise ConfigError(
            f"close_at = {config.close_at:g}: with trained_factors = 'alternate' a late reply holds the wrong "
            "factor for its round; use close_at = 1"
        )
    if config.close_at < 1 and config.aggregation == "het":
        raise ConfigError(
            f"close_at = {config.close_at:g}: aggregation = 'het' weighs replies by their norm alone, late ones too; "
            "use close_at = 1 or another aggregation"
        )


def check_deployable(config: RunConfig) -> None:
    """Errors: `ConfigError` for what needs a virtual clock."""
    if config.close_at < 1:
        raise ConfigError(
            f"close_at = {config.close_at:g}: a deployment waits for all replies so far; use close_at = 1"
        )
