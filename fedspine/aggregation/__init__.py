"""Aggregation rules: one file per rule, one signature.

A rule takes the global adapters in full coordinates, the devices' updates in device order, and the model's shape, and
gives the new global adapters. To add a rule, write a file with `aggregate` and name it in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedspine.aggregation import coordinate, fair, flex, het, product, r2sp, zero_pad
from fedspine.aggregation.update import Update
from fedspine.structure import ModelShape
from fedspine.types import Array, Arrays

Rule = Callable[[Arrays, Sequence[Update], ModelShape], dict[str, Array]]

RULES: dict[str, Rule] = {
    "product": product.aggregate,
    "coordinate": coordinate.aggregate,
    "flex": flex.aggregate,
    "zero-pad": zero_pad.aggregate,
    "fair": fair.aggregate,
    "het": het.aggregate,
    "r2sp": r2sp.aggregate,
}
"""By the value of the configuration key `aggregation`."""
