"""Selection: exact budgets, monotone cuts, least important first."""

from __future__ import annotations

import numpy as np
import pytest

from fedspine.errors import ModelError
from fedspine.pruning.families import describe
from fedspine.pruning.select import check_reachable, max_sparsity, select
from fedspine.structure import Structure
from tests.tiny import TARGETS, random_scores, tiny_model

SHAPE = describe(tiny_model(), "bert", TARGETS)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.62])
def test_sparsity_is_met_to_half_a_channel(ratio: float) -> None:
    structure = select(Structure.full(SHAPE), random_scores(SHAPE), ratio, SHAPE)
    layer_parameters = SHAPE.prunable_parameters / SHAPE.layers
    assert abs(structure.sparsity(SHAPE) - ratio) <= 0.5 * SHAPE.channel_parameters / layer_parameters + 1e-9


def test_cuts_are_monotone_and_counted_right() -> None:
    structure = Structure.full(SHAPE)
    for step, ratio in enumerate((0.1, 0.2, 0.35, 0.5)):
        smaller = select(structure, random_scores(SHAPE, step), ratio, SHAPE)
        assert structure.contains(smaller)
        assert not smaller.contains(structure)
        structure = smaller
    assert select(structure, random_scores(SHAPE, 9), 0.2, SHAPE) == structure


def test_the_least_important_go() -> None:
    scores = random_scores(SHAPE)
    structure = select(Structure.full(SHAPE), scores, 0.5, SHAPE)
    for layer, parts in enumerate(scores):
        for part, unit in zip(parts, ("heads", "channels"), strict=True):
            kept = structure.mask(layer, unit)
            assert part[kept].min() > part[~kept].max()


def test_bits_round_trip() -> None:
    rng = np.random.default_rng(1)
    masks = [(rng.random(5) < 0.5, rng.random(19) < 0.5) for _ in range(3)]
    structure = Structure.from_masks(masks)
    for layer, (heads, channels) in enumerate(masks):
        assert (structure.head_mask(layer) == heads).all()
        assert (structure.channel_mask(layer) == channels).all()
    assert structure.nbytes == 3 * (1 + 3)


def test_unreachable_target_is_an_error() -> None:
    limit = max_sparsity(SHAPE)
    check_reachable(limit, SHAPE)
    with pytest.raises(ModelError, match=r"target_sparsity = 0\.95: this model can be cut to at most 0\.\d+"):
        check_reachable(0.95, SHAPE)
