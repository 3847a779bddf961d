"""Model families: where a Hugging Face architecture keeps the layers, projections and task head.

To add a family, add one entry to `FAMILIES` and one test (see `tests/pruning/test_families.py`).

A head group is {query, key, value rows with biases; output columns}, an FFN channel is {up row with bias; down
column}: the coupled structures of FedSpine section on pruning, and those that torch-pruning's dependency graph finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedspine.errors import ModelError
from fedspine.structure import ModelShape, ModuleShape

HEAD_ROWS = ("q", "k", "v")
"""Roles whose output features belong to heads; `o` has the matching inputs."""
CHANNEL_ROWS = ("up", "gate")
"""Roles whose output features are FFN channels; `down` has the matching inputs."""


@dataclass(frozen=True)
class Family:
    """Paths inside a model, relative where said."""

    layers: str
    """The list of transformer layers, from the top of the model."""
    roles: Mapping[str, str]
    """Role (q, k, v, o, up, down, gate) to the linear layer's path inside a transformer layer."""
    head: str
    """The task head that is trained next to the adapters, from the top of the model."""
    first_token: tuple[str, str] | None = None
    """Where the head reads the first token only: the attention, and the module that adds its output to its input."""


_BERT_ROLES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}

_BERT_FIRST_TOKEN = ("attention.self", "attention.output")

FAMILIES: dict[str, Family] = {
    "bert": Family("bert.encoder.layer", _BERT_ROLES, "classifier", _BERT_FIRST_TOKEN),
    "roberta": Family("roberta.encoder.layer", _BERT_ROLES, "classifier", _BERT_FIRST_TOKEN),
    "xlm-roberta": Family("roberta.encoder.layer", _BERT_ROLES, "classifier", _BERT_FIRST_TOKEN),
}
"""By `model_type` of the transformers configuration."""


def family_of(model_type: str) -> Family:
    """The table entry. Errors: `ModelError` that lists the supported families and says how to add one."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"model family '{model_type}' is not supported; supported: {', '.join(FAMILIES)}. "
            "To add one, write an entry in fedspine/pruning/families.py"
        )
    return FAMILIES[model_type]


def unit_of(role: str) -> tuple[str, str]:
    """(unit, axis) that cutting removes from a projection of this role."""
    if role in HEAD_ROWS:
        return "heads", "rows"
    if role in CHANNEL_ROWS:
        return "channels", "rows"
    return ("heads" if role == "o" else "channels"), "columns"


def linear_layers(model: nn.Module, family: Family) -> list[dict[str, str]]:
    """Full dotted names of the projections: one mapping of role to name per transformer layer."""
    layers = model.get_submodule(family.layers)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"'{family.layers}' is not a list of layers in {type(model).__name__}")
    return [
        {role: f"{family.layers}.{index}.{path}" for role, path in family.roles.items()} for index in range(len(layers))
    ]


def describe(model: nn.Module, model_type: str, targets: tuple[str, ...]) -> ModelShape:
    """Count what the model holds and list the projections that carry adapters (roles in `targets`).

    Errors: `ModelError` when a target is not a projection of the family.
    """
    family = family_of(model_type)
    missing = [role for role in targets if role not in family.roles]
    if missing:
        raise ModelError(
            f"lora_targets has '{missing[0]}', which family '{model_type}' does not have; "
            f"it has {', '.join(family.roles)}"
        )
    names = linear_layers(model, family)
    config: Any = model.config
    heads = int(config.num_attention_heads)
    query, up = (_linear(model, names[0][role]) for role in ("q", "up"))
    head_dim = query.out_features // heads
    modules = []
    for layer, roles in enumerate(names):
        for role in family.roles:
            if role in targets:
                linear = _linear(model, roles[role])
                unit, axis = unit_of(role)
                modules.append(
                    ModuleShape(roles[role], layer, role, linear.out_features, linear.in_features, unit, axis)
                )
    return ModelShape(
        family=model_type,
        layers=len(names),
        hidden=query.in_features,
        heads=heads,
        head_dim=head_dim,
        channels=up.out_features,
        head_parameters=head_dim * _unit_parameters(model, names[0], "heads"),
        channel_parameters=_unit_parameters(model, names[0], "channels"),
        total_parameters=sum(p.numel() for p in model.parameters()),
        head_bytes=4 * sum(p.numel() for p in model.get_submodule(family.head).parameters()),
        modules=tuple(modules),
    )


def _unit_parameters(model: nn.Module, roles: dict[str, str], unit: str) -> int:
    """Parameters that leave with one feature of the unit."""
    total = 0
    for role, name in roles.items():
        kind, axis = unit_of(role)
        if kind == unit:
            linear = _linear(model, name)
            total += linear.in_features + int(linear.bias is not None) if axis == "rows" else linear.out_features
    return total


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, torch.Tensor):
        raise ModelError(f"'{name}' is not a linear layer in {type(model).__name__}")
    return module
