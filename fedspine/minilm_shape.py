"""The counts of MiniLM-L6 by heart, for the scheduler alone: neither torch nor the model is loaded."""

from __future__ import annotations

from fedspine.config import RunConfig
from fedspine.errors import ConfigError
from fedspine.structure import ModelShape, ModuleShape

MODEL = "all-MiniLM-L6-v2"


def minilm_shape(config: RunConfig) -> ModelShape:
    """The counts of MiniLM-L6 with two classes, with adapters on the configuration's targets.

    Errors: `ConfigError` for another model, or a target that it does not have.
    """
    layers, hidden, heads, head_dim, channels = 6, 384, 12, 32, 1536
    attention, inner = heads * head_dim, channels
    roles = {
        "q": (attention, hidden, "heads", "rows", (head_dim,)),
        "k": (attention, hidden, "heads", "rows", (head_dim,)),
        "v": (attention, hidden, "heads", "rows", (head_dim,)),
        "o": (hidden, attention, "heads", "columns", (head_dim,)),
        "up": (inner, hidden, "channels", "rows", (1,)),
        "down": (hidden, inner, "channels", "columns", (1,)),
    }
    if config.model != MODEL:
        raise ConfigError(f"model = '{config.model}': without training only the counts of '{MODEL}' are known")
    for role in config.lora_targets:
        if role not in roles:
            raise ConfigError(f"lora_targets has '{role}', which {MODEL} does not have; it has {', '.join(roles)}")
    return ModelShape(
        family="bert",
        layers=layers,
        hidden=hidden,
        heads=heads,
        queries=1,
        head_dim=head_dim,
        channels=channels,
        head_parameters=head_dim * (4 * hidden + 3),
        head_weights=head_dim * 4 * hidden,
        channel_parameters=2 * hidden + 1,
        channel_weights=2 * hidden,
        total_parameters=22_713_986,
        head_bytes=4 * 2 * (hidden + 1),
        modules=tuple(
            ModuleShape(f"{layer}.{role}", layer, role, *roles[role])
            for layer in range(layers)
            for role in roles
            if role in config.lora_targets
        ),
    )
