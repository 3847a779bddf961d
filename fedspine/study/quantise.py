"""Quantised weights: the projections of all layers as bitsandbytes' layers; nothing else of the model changes."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from fedspine.errors import ModelError
from fedspine.study.design import Level, compression
from fedspine.study.workload import WEIGHT_BYTES

if TYPE_CHECKING:
    from torch import nn


def check_quantiser(level: Level) -> None:
    """Errors: `ModelError` when a compression needs bitsandbytes, and it is not installed."""
    if compression(level)[0] in WEIGHT_BYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"compression = '{level}' needs bitsandbytes: pip install 'fedspine[quant]'")


def quantise(model: nn.Module, family: str, kind: str) -> None:
    """`int8` or `nf4` (with quantised scales), in place; arithmetic stays in float32.

    Leave the new layers in training mode: in evaluation mode bitsandbytes computes in another precision, and on some
    CPUs repacks the weights for a product that has no gradient.
    Errors: `ModelError` without bitsandbytes.
    """
    check_quantiser(kind)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # tells of a kernel that is unused here
    import torch
    from bitsandbytes import nn as layers

    from fedspine.pruning.families import projections

    for module in projections(model, family):
        linear: Any = model.get_submodule(module.name)
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        weight, device = linear.weight.data, linear.weight.device
        if kind == "int8":
            made = layers.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
            made.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            made = layers.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4", device="meta")
            made.weight = layers.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=made)
        made.bias = linear.bias
        model.set_submodule(module.name, made.to(device))  # quantises
    setattr(model, f"is_loaded_in_{8 if kind == 'int8' else 4}bit", True)  # where PEFT looks
