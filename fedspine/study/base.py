"""The model that a cell starts from, where that is none that can be loaded as it stands.

A model without some of its layers, or one that was cut unevenly and exported, is written to a folder that every process
of the cell can load, and that is gone afterwards. The cut one gets its full size again, with zeros; `start_structure`
says what is there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine.artifact import Cut, cut_of, load_model, save_model
from fedspine.config import RunConfig
from fedspine.model import load_base, load_tokenizer
from fedspine.pruning.depth import kept_layers, weights_of_layers, with_layers
from fedspine.pruning.families import describe, family_of, projections
from fedspine.structure import ModelShape, Structure
from fedspine.study.design import Point, compression
from fedspine.study.estimate import CellPlan


@contextmanager
def loadable(plan: CellPlan, classes: int) -> Iterator[CellPlan]:
    """The plan, its configuration naming a model that can be loaded. Errors: `ModelError`."""
    kind, share = compression(plan.cell.levels["compression"] or "none")
    config = plan.config
    cut = cut_of(config.model) if kind == "ready" else None
    if kind != "depth" and cut is None:
        yield plan
        return
    with tempfile.TemporaryDirectory(prefix="fedspine-") as place:
        folder = Path(place) / "model"
        if cut is None:
            _write_shallow(config, share, classes, folder)
        else:
            _write_whole(config, cut, folder)
        load_tokenizer(config).save_pretrained(folder)
        yield replace(plan, config=replace(config, model=str(folder)))


def start_structure(levels: Point, shape: ModelShape) -> Structure:
    """What a cell's model has before it is cut: of one that was cut before, the first heads and channels."""
    kind, _, folder = str(levels["compression"]).partition(":")
    cut = cut_of(folder) if kind == "ready" else None
    return _first_units(cut, shape) if cut else Structure.full(shape)


def _first_units(cut: Cut, shape: ModelShape) -> Structure:
    heads, channels = np.arange(shape.heads), np.arange(shape.channels)
    return Structure.from_masks([(heads < kept_heads, channels < kept) for kept_heads, kept in cut.layers])


def _write_shallow(config: RunConfig, share: float, classes: int, folder: Path) -> None:
    model, family = load_base(config, classes, load_tokenizer(config).pad_token_id or 0)
    shape = describe(model, family, config.lora_targets)
    kept = kept_layers(shape.layers, share)
    weights = weights_of_layers(model.state_dict(), family_of(family).layers, kept)
    _write(folder, weights, with_layers(model.config, kept), config, replace(shape, layers=len(kept)))


def _write_whole(config: RunConfig, cut: Cut, folder: Path) -> None:
    small = load_model(config.model)
    with torch.device("meta"):
        whole = type(small)(small.config)
    shape = describe(whole, cut.family, config.lora_targets)
    structure, weights = _first_units(cut, shape), dict(small.state_dict())
    for module in projections(whole, cut.family):
        kept = torch.from_numpy(module.features(structure.mask(module.layer, module.unit)))
        rows = module.axis == "rows"
        for part in ("weight", "bias") if rows else ("weight",):
            name = f"{module.name}.{part}"
            if name in weights:
                room = torch.zeros(whole.get_parameter(name).shape)
                room[kept if rows else (slice(None), kept)] = weights[name]
                weights[name] = room
    _write(folder, weights, small.config, replace(config, task=cut.task), shape)


def _write(folder: Path, weights: dict[str, torch.Tensor], settings: Any, config: RunConfig, shape: ModelShape) -> None:
    counts = Structure.full(shape).counts()
    save_model(folder, weights, settings, config.task, counts, config.model)
