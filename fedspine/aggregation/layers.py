"""Joining devices some of which have trained the adapters of the top layers only (`slow_layers`).

A layer's adapters are joined, by any rule, over the devices that have trained them; a layer that nobody has trained
stays as it was. So what few devices train is not diluted by those that had no say in it, as with rows that few keep
(HeteroFL, arXiv 2010.01264, and DepthFL, OpenReview pf8RIZTMU58, average every parameter over its holders). The head
is everybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from fedspine.aggregation import Rule
from fedspine.aggregation.update import Update, mean_heads
from fedspine.lora.adapters import HEAD
from fedspine.structure import ModelShape
from fedspine.types import Array, Arrays


def by_layers(rule: Rule, current: Arrays, updates: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
    """New global adapters, as `rule` makes them; updates in device order."""
    if not any(update.first_layer for update in updates):
        return rule(current, updates, shape)
    result = dict(current)
    bounds = sorted({0, shape.layers, *(update.first_layer for update in updates)})
    for low, high in pairwise(bounds):
        modules = tuple(module for module in shape.modules if low <= module.layer < high)
        trained = [update for update in updates if update.first_layer <= low]
        if trained:
            names = {f"{module.name}.{side}" for module in modules for side in "AB"}
            part = {name: array for name, array in current.items() if name in names or name.startswith(HEAD)}
            result |= rule(part, trained, replace(shape, modules=modules))
    return result | mean_heads(current, updates)
