"""Selection: exact budgets, monotone cuts or cuts anew, least important first."""

from __future__ import annotations

import numpy as np
import pytest

from fedspine.config import RunConfig
from fedspine.errors import ModelError
from fedspine.pruning.families import describe
from fedspine.pruning.select import check_reachable, max_sparsity, recut, select
from fedspine.structure import Structure
from fedspine.types import Scores
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
        assert smaller.within(structure)
        assert not structure.within(smaller)
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


def wide_scores(scale: float = 1.0, seed: int = 0) -> Scores:
    """The heads of the first layer and the channels of the second count `scale` times as much."""
    rng = np.random.default_rng(seed)
    return tuple(
        ((heads * rng.random(4)).astype(np.float32), (channels * rng.random(32)).astype(np.float32))
        for heads, channels in ((scale, 1.0), (1.0, scale))
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_global_sparsity_is_met_and_passed_by_less_than_a_unit(ratio: float, seed: int) -> None:
    structure = select(Structure.full(SHAPE), wide_scores(seed=seed), ratio, SHAPE, "global")
    passed = (structure.sparsity(SHAPE) - ratio) * SHAPE.prunable_parameters
    channels_to_spare = any(count < SHAPE.channels for _, count in structure.counts())
    assert -1 <= passed < (SHAPE.channel_parameters if channels_to_spare else SHAPE.head_parameters)


def test_global_cuts_are_monotone_and_end_at_the_floors() -> None:
    structure = Structure.full(SHAPE)
    for step, ratio in enumerate((0.1, 0.2, 0.35, 0.5, 0.65, max_sparsity(SHAPE))):
        smaller = select(structure, wide_scores(seed=step), ratio, SHAPE, "global")
        assert smaller.within(structure)
        assert not structure.within(smaller)
        assert all(heads >= 1 and channels >= 1 for heads, channels in smaller.counts())
        for again in (ratio, smaller.sparsity(SHAPE), 0.2 * ratio):
            assert select(smaller, wide_scores(seed=9), again, SHAPE, "global") == smaller
        structure = smaller
    assert structure.counts() == ((1, 1), (1, 1))
    assert structure.sparsity(SHAPE) == pytest.approx(max_sparsity(SHAPE))


def test_global_keeps_the_best_per_parameter_wherever_it_is() -> None:
    """Against a sort by hand; a common factor of a layer's heads or channels makes no difference."""
    scores = wide_scores()
    structure = select(Structure.full(SHAPE), scores, 0.5, SHAPE, "global")
    assert select(Structure.full(SHAPE), wide_scores(1024.0), 0.5, SHAPE, "global") == structure
    assert len(set(structure.counts())) == 2
    kept, cut = [], []
    for layer, (heads, channels) in enumerate(scores):
        for part, unit in ((heads, "heads"), (channels, "channels")):
            mask = structure.mask(layer, unit)
            density = part / part.mean()
            kept.append((unit, density[mask]))
            cut.append((unit, density[~mask]))
    worst_head = min(values.min() for unit, values in kept if unit == "heads")
    best_cut_head = max(values.max() for unit, values in cut if unit == "heads")
    worst_channel = min(values.min() for unit, values in kept if unit == "channels")
    best_cut_channel = max(values.max() for unit, values in cut if unit == "channels")
    assert worst_head > best_cut_head
    assert worst_channel > best_cut_channel
    assert worst_head > best_cut_channel


def test_a_layer_without_scores_keeps_its_floor() -> None:
    scores = (wide_scores()[0], (np.zeros(4, np.float32), np.zeros(32, np.float32)))
    structure = select(Structure.full(SHAPE), scores, 0.5, SHAPE, "global")
    assert structure.counts()[1] == (1, 1)
    assert structure == select(Structure.full(SHAPE), scores, 0.5, SHAPE, "global")


def test_with_regrowth_the_whole_model_is_cut_anew() -> None:
    """Devices that were cut by different scores keep the same afterwards, and what went can return."""
    early = [select(Structure.full(SHAPE), random_scores(SHAPE, seed), 0.3, SHAPE) for seed in (1, 2)]
    late = random_scores(SHAPE, 3)
    renewed = [recut(structure, late, 0.5, SHAPE, RunConfig(regrowth=True)) for structure in early]
    assert renewed[0] == renewed[1] == select(Structure.full(SHAPE), late, 0.5, SHAPE)
    assert not renewed[0].within(early[0])
    for structure in early:
        assert recut(structure, late, 0.5, SHAPE, RunConfig(regrowth=False)).within(structure)
