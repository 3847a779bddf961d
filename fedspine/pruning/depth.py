"""Depth pruning: whole layers go, evenly chosen; the first and the last stay.

What is left is an ordinary model of its family, its layers numbered anew. An adapter of such a model belongs to that
model only: its layer 1 is another one of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from fedspine.errors import ModelError


def kept_layers(layers: int, share: float) -> list[int]:
    """The layers that stay of so many, when `share` of them goes; at least one does.

    Errors: `ModelError` when the first and the last cannot both stay.
    """
    left = layers - max(1, round(share * layers))
    if left < 2:
        remedy = f"a share of at most {(layers - 2) / layers:.2f}" if layers > 2 else "compression = width:SHARE"
        raise ModelError(
            f"depth pruning by {share:g} of {layers} layers: the first and the last must stay; use {remedy}"
        )
    return [round(place * (layers - 1) / (left - 1)) for place in range(left)]


def with_layers(settings: Any, kept: Sequence[int]) -> Any:
    """A copy of a model's configuration with these of its layers."""
    fewer = deepcopy(settings)
    fewer.num_hidden_layers = len(kept)
    if getattr(settings, "layer_types", None):
        fewer.layer_types = [settings.layer_types[layer] for layer in kept]
    return fewer


def weights_of_layers(weights: Mapping[str, torch.Tensor], layers: str, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """The tensors of a model with these of its layers only, numbered anew. `layers`: the path of their list."""
    found = {}
    for name, tensor in weights.items():
        layer, _, rest = name.removeprefix(f"{layers}.").partition(".")
        if not name.startswith(f"{layers}."):
            found[name] = tensor
        elif int(layer) in kept:
            found[f"{layers}.{kept.index(int(layer))}.{rest}"] = tensor
    return found
