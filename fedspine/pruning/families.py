"""Model families: where a Hugging Face architecture keeps the layers, projections and task head.

To add a family, add one entry to `FAMILIES` and one tiny model (see `tests/tiny.py`).

A head is {query, key, value rows with biases; output columns}: where attention is grouped, of a key-value head with
all its query heads. An FFN channel is {up row, gate row where there is one, with biases; down column}. These are the
coupled structures of FedSpine section on pruning, and those that torch-pruning's dependency graph finds. Embeddings,
norms (also those over the features of one head) and the residual stream are never cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from fedspine.errors import ModelError
from fedspine.structure import ModelShape, ModuleShape

ROLES = {
    "q": ("heads", "rows"),
    "k": ("heads", "rows"),
    "v": ("heads", "rows"),
    "qkv": ("heads", "rows"),
    "o": ("heads", "columns"),
    "up": ("channels", "rows"),
    "gate": ("channels", "rows"),
    "gate_up": ("channels", "rows"),
    "down": ("channels", "columns"),
}
"""What a projection does, and the (unit, axis) that cutting removes from it."""
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "up": "gate_up", "gate": "gate_up"}
"""The projection that stands for a role in a family that has it only fused with others."""


@dataclass(frozen=True)
class Family:
    """Paths inside a model, relative where said."""

    layers: str
    """The list of transformer layers, from the top of the model."""
    roles: Mapping[str, str]
    """Role (of `ROLES`) to the linear layer's path inside a transformer layer."""
    head: tuple[str, ...]
    """The modules of the classifier's head, which are trained next to the adapters, from the top of the model."""
    first_token: tuple[str, str] | None = None
    """Where the head reads the first token only: the attention, and the module that adds its output to its input."""
    head_by_head: bool = False
    """The rows of `qkv` are q, k, v of the first head, then of the next; otherwise all of q, then of k, then of v."""
    head_counts: tuple[str, ...] = ()
    """Where the code of a layer reads how many heads it has, instead of from its weights: paths of attributes."""
    decoder: bool = False
    """Whether it is also a causal language model; the head of that one stays frozen."""


_BERT_ROLES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_BERT_FIRST_TOKEN = ("attention.self", "attention.output")
_DISTILBERT_ROLES = {
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "o": "attention.out_lin",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
}
_LLAMA_ROLES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "up": "mlp.up_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
_PHI3_ROLES = {
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
_PHI3_HEAD_COUNTS = ("self_attn.config.num_attention_heads", "self_attn.num_key_value_heads")
_NEOX_ROLES = {
    "qkv": "attention.query_key_value",
    "o": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}

FAMILIES: dict[str, Family] = {
    "bert": Family("bert.encoder.layer", _BERT_ROLES, ("classifier",), first_token=_BERT_FIRST_TOKEN),
    "roberta": Family("roberta.encoder.layer", _BERT_ROLES, ("classifier",), first_token=_BERT_FIRST_TOKEN),
    "xlm-roberta": Family("roberta.encoder.layer", _BERT_ROLES, ("classifier",), first_token=_BERT_FIRST_TOKEN),
    "distilbert": Family("distilbert.transformer.layer", _DISTILBERT_ROLES, ("pre_classifier", "classifier")),
    "llama": Family("model.layers", _LLAMA_ROLES, ("score",), decoder=True),
    "qwen2": Family("model.layers", _LLAMA_ROLES, ("score",), decoder=True),
    "qwen3": Family("model.layers", _LLAMA_ROLES, ("score",), decoder=True),
    "mistral": Family("model.layers", _LLAMA_ROLES, ("score",), decoder=True),
    "gemma": Family("model.layers", _LLAMA_ROLES, ("score",), decoder=True),
    "gemma2": Family("model.layers", _LLAMA_ROLES, ("score",), decoder=True),
    "gemma3_text": Family("model.layers", _LLAMA_ROLES, ("score",), decoder=True),
    "phi3": Family("model.layers", _PHI3_ROLES, ("score",), decoder=True, head_counts=_PHI3_HEAD_COUNTS),
    "gpt_neox": Family("gpt_neox.layers", _NEOX_ROLES, ("score",), decoder=True, head_by_head=True),
}
"""By `model_type` of the transformers configuration."""


def family_of(model_type: str) -> Family:
    """The table entry. Errors: `ModelError` that lists the supported families and says how to add one."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"model family '{model_type}' is not supported; supported: {', '.join(FAMILIES)}. "
            "To add one, write an entry in fedspine/pruning/families.py: the paths of its layers, projections and head"
        )
    return FAMILIES[model_type]


def decoders() -> list[str]:
    """The families that can be causal language models."""
    return [name for name, family in FAMILIES.items() if family.decoder]


def head_of(model: nn.Module, model_type: str) -> tuple[str, ...]:
    """The modules of the task head that are trained: none of a language model."""
    family = family_of(model_type)
    return () if family.decoder and not hasattr(model, family.head[0]) else family.head


def projections(model: nn.Module, model_type: str) -> list[ModuleShape]:
    """Every linear layer that cutting touches, transformer layer by layer, as it is uncut.

    Errors: `ModelError` when the model is not what the table says, or its layers differ from one another.
    """
    family = family_of(model_type)
    layers = model.get_submodule(family.layers)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"'{family.layers}' is not a list of layers in {type(model).__name__}")
    config: Any = model.config
    heads, queries = _head_counts(config)
    result = []
    for index in range(len(layers)):
        for role, path in family.roles.items():
            name = f"{family.layers}.{index}.{path}"
            linear, first = _linear(model, name), _linear(model, f"{family.layers}.0.{path}")
            if linear.weight.shape != first.weight.shape:
                raise ModelError(f"'{name}' has another size than in layer 0: layers must be equal before they are cut")
            unit, axis = ROLES[role]
            features = linear.out_features if axis == "rows" else linear.in_features
            segments = _segments(role, features, heads, queries, family.head_by_head)
            if (heads if unit == "heads" else features // sum(segments)) * sum(segments) != features:
                raise ModelError(f"'{name}' has {features} {axis}, which {heads} heads do not share evenly")
            result.append(ModuleShape(name, index, role, linear.out_features, linear.in_features, unit, axis, segments))
    return result


def describe(model: nn.Module, model_type: str, targets: tuple[str, ...]) -> ModelShape:
    """Count what the model holds and list the projections that carry adapters.

    These are the roles in `targets`; a role that the family has only fused with others (`FUSED`) means the whole fused
    projection, with one adapter. Errors: `ModelError` when a target is not a projection of the family.
    """
    family = family_of(model_type)
    adapted = {role: role if role in family.roles else FUSED.get(role) for role in targets}
    missing = [role for role, found in adapted.items() if found not in family.roles]
    if missing:
        raise ModelError(
            f"lora_targets has '{missing[0]}', which family '{model_type}' does not have; "
            f"it has {', '.join(family.roles)}"
        )
    modules = projections(model, model_type)
    config: Any = model.config
    heads, queries = _head_counts(config)
    first = {module.role: module for module in modules if module.layer == 0}
    head_weights, head_biases = _of_one_unit(model, modules, "heads")
    channel_weights, channel_biases = _of_one_unit(model, modules, "channels")
    return ModelShape(
        family=model_type,
        layers=modules[-1].layer + 1,
        hidden=int(config.hidden_size),
        heads=heads,
        queries=queries,
        head_dim=first["o"].unit_size,
        channels=first["down"].d_in,
        head_parameters=head_weights + head_biases,
        head_weights=head_weights,
        channel_parameters=channel_weights + channel_biases,
        channel_weights=channel_weights,
        total_parameters=sum(p.numel() for p in model.parameters()),
        head_bytes=4
        * sum(p.numel() for path in head_of(model, model_type) for p in model.get_submodule(path).parameters()),
        modules=tuple(module for module in modules if module.role in adapted.values()),
        vocabulary=0 if head_of(model, model_type) else int(config.vocab_size),
    )


def head_counters(model: nn.Module, model_type: str) -> list[list[tuple[Any, str, int]]]:
    """Per layer, what has to be set when heads are cut, in proportion: (owner, attribute, its value uncut).

    The configuration, which layers share, becomes a copy in each of them, so that they may differ.
    """
    family = family_of(model_type)
    layers: Any = model.get_submodule(family.layers)
    result = []
    for layer in layers:
        for part in layer.modules() if family.head_counts else ():
            if hasattr(part, "config"):
                part.config = copy(part.config)
        owners = [(attrgetter(path)(layer), name) for path, _, name in (p.rpartition(".") for p in family.head_counts)]
        result.append([(owner, name, int(getattr(owner, name))) for owner, name in owners])
    return result


def _head_counts(config: Any) -> tuple[int, int]:
    """(heads or KV groups, query heads in each)."""
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    return heads, queries // heads


def _segments(role: str, features: int, heads: int, queries: int, head_by_head: bool) -> tuple[int, ...]:
    """Features of one head (group) or channel in each segment of a projection."""
    if role == "gate_up":
        return (1, 1)
    if role != "qkv":
        return (features // heads,) if ROLES[role][0] == "heads" else (1,)
    size = features // (heads * (queries + 2))
    return ((queries + 2) * size,) if head_by_head else (queries * size, size, size)


def _of_one_unit(model: nn.Module, modules: list[ModuleShape], unit: str) -> tuple[int, int]:
    """(weights, biases) that leave with one head or channel of a layer."""
    weights = biases = 0
    for module in modules:
        if module.layer == 0 and module.unit == unit:
            rows = module.axis == "rows"
            weights += module.unit_size * (module.d_in if rows else module.d_out)
            biases += module.unit_size * (rows and _linear(model, module.name).bias is not None)
    return weights, biases


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, torch.Tensor):
        raise ModelError(f"'{name}' is not a linear layer in {type(model).__name__}")
    return module
