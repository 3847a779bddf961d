"""Values of several keys that do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedspine.errors import ConfigError
from fedspine.perturbation import parse_perturbation

if TYPE_CHECKING:
    from fedspine.config import RunConfig

_FACTORWISE = ("coordinate", "zero-pad")
_UNNORMED = ("product", "coordinate", "flex", "zero-pad", "fair", "r2sp")
"""Weighed by examples, which staleness can discount."""
_WITHOUT_WEIGHTS = ("fisher", "lora-gradient", "magnitude", "l1", "random")
"""Importance that needs no gradients of frozen weights, and so none of layers whose adapters are not trained."""
_NEEDS: tuple[tuple[str, tuple[Any, ...], dict[str, tuple[Any, ...]]], ...] = (
    ("trained_factors", ("both",), {"aggregation": _FACTORWISE}),
    ("fold", ("none",), {"aggregation": ("coordinate",), "trained_factors": ("both",), "target_sparsity": (0.0,)}),
    ("fold", ("none", "residual"), {"policy": ("fixed", "random", "tertile")}),
    ("fold", ("none", "all"), {"policy": ("fixed",), "rank_decay": (1.0,)}),
    ("rank_growth", (1.0,), {"policy": ("fixed",), "trained_factors": ("both",), "rank_decay": (1.0,)}),
    ("rank_growth", (1.0,), {"aggregation": _FACTORWISE, "fold": ("none",)}),
    ("wire_dtype", ("float32",), {"fold": ("none",)}),
    ("distill_steps", (0,), {"task": ("classification",), "fold": ("none",), "trained_factors": ("both", "b")}),
    (
        "slow_layers",
        (0,),
        {"trained_factors": ("both",), "fold": ("none",), "rank_growth": (1.0,), "rank_decay": (1.0,)},
    ),
    ("slow_layers", (0,), {"masks": ("shared",), "importance": _WITHOUT_WEIGHTS}),
    ("close_at", (1.0,), {"fold": ("none",), "trained_factors": ("both", "b"), "aggregation": _UNNORMED}),
)
"""(a key, its values that need nothing, what other keys must be with all its other values)."""


def check_together(config: RunConfig) -> None:
    """Errors: `ConfigError` for values that do not go together."""
    if config.sampled > config.devices:
        raise ConfigError(
            f"sampled = {config.sampled}: more than devices = {config.devices}; sample at most as many as there are"
        )
    if config.min_rank > config.max_rank:
        raise ConfigError(f"min_rank = {config.min_rank}: must not exceed max_rank = {config.max_rank}")
    if not config.min_rank <= config.fixed_rank <= config.max_rank:
        raise ConfigError(
            f"fixed_rank = {config.fixed_rank}: must lie between min_rank = {config.min_rank} "
            f"and max_rank = {config.max_rank}"
        )
    for name, without, needs in _NEEDS:
        for key, allowed in needs.items():
            if getattr(config, name) not in without and getattr(config, key) not in allowed:
                values = " or ".join(str(value) for value in allowed)
                raise ConfigError(
                    f"{key} = {getattr(config, key)!r}: with {name} = {getattr(config, name)!r} it must be {values}; "
                    f"or leave {name} at {without[0]!r}"
                )
    parse_perturbation(config.perturbation)
    if config.distill_steps and not config.public_examples:
        raise ConfigError(
            f"distill_steps = {config.distill_steps}: the server needs texts to distill with, such as "
            "public_examples = 512, which no device gets then"
        )
    if config.warmup_ratio >= config.ramp_ratio:
        raise ConfigError(f"warmup_ratio = {config.warmup_ratio}: must be below ramp_ratio = {config.ramp_ratio}")


def check_layers(config: RunConfig, layers: int) -> None:
    """Errors: `ConfigError` for a part of the model's `layers` that is no part."""
    if config.slow_layers >= layers:
        raise ConfigError(
            f"slow_layers = {config.slow_layers}: must be below the {layers} layers of the model; 0 lets slow devices "
            "train all of them"
        )


def check_simulated(config: RunConfig) -> None:
    """Errors: `ConfigError` for what only a real federation can do."""
    if config.cost != "virtual":
        raise ConfigError(
            f"cost = '{config.cost}': simulated devices have no clock but the virtual one; use cost = 'virtual', or "
            "run it on real devices with `fedspine serve`"
        )
    if config.deadline_seconds:
        raise ConfigError(
            f"deadline_seconds = {config.deadline_seconds:g}: simulated devices are not waited for by the wall clock; "
            "use close_at, which closes a round on the virtual one, or run it on real devices with `fedspine serve`"
        )


def check_deployable(config: RunConfig) -> None:
    """Errors: `ConfigError` for what only a simulation can do."""
    if config.close_at < 1:
        raise ConfigError(
            f"close_at = {config.close_at:g}: a deployment waits for all replies so far; use close_at = 1"
        )
    if config.perturbation != "none":
        raise ConfigError(f"perturbation = '{config.perturbation}': devices are real here; use perturbation = 'none'")
    if config.cost == "measured" and config.policy == "clairvoyant":
        raise ConfigError(
            "policy = 'clairvoyant': nobody knows the true times of real devices beforehand; use another policy, or "
            "cost = 'virtual'"
        )
    for key, stateless in (("fold", "none"), ("trained_factors", "both")):
        value = getattr(config, key)
        if value in ("all", "residual", "local-b"):
            raise ConfigError(
                f"{key} = '{value}': what a device keeps between rounds is kept by the server of a simulation; "
                f"in a deployment use {key} = '{stateless}', or simulate"
            )
