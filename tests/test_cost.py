"""Costs against hand counts, against PyTorch's own FLOP counter, and against the real adapters' bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedspine.cost import LOSS_FLOPS, Workload
from fedspine.lora.adapters import narrow, nbytes
from fedspine.pruning.families import FAMILIES, family_of
from fedspine.pruning.select import select
from fedspine.structure import Structure
from tests.tiny import ENCODERS, random_arrays, random_scores, tiny_model, tiny_resident, uneven_structure

RESIDENT = tiny_resident()
SHAPE = RESIDENT.shape
FULL = Structure.full(SHAPE)
WORKLOAD = Workload(SHAPE, local_iterations=3, batch_size=2, length=9, score_bytes=4 * 2 * (4 + 32))


def half() -> Structure:
    """Every second head and channel."""
    mask = (np.arange(4) % 2 == 0, np.arange(32) % 2 == 0)
    return Structure.from_masks([mask, mask])


HALF = half()
ADAPTER_VALUES = sum(array.size for array in narrow(random_arrays(RESIDENT), FULL, 4, SHAPE).values())


def test_flops_by_hand() -> None:
    """Two layers, width 24, 4 heads of 6, 32 channels; 2 texts of 9 tokens; rank 4 on q, v, o, up, down."""
    tokens = 2 * 9
    layer = 2 * tokens * 24 * (4 * 24 + 2 * 32) + 4 * tokens * 9 * 24
    adapters = 2 * tokens * 4 * (3 * (24 + 24) + 2 * (24 + 32))
    expected = 2 * 2 * layer + 3 * 2 * adapters
    assert WORKLOAD.iteration_flops(FULL.counts(), 4) == expected
    assert WORKLOAD.round_flops(FULL, 4) == WORKLOAD.planned_flops(0.0, 4) == 3 * expected


def test_flops_of_a_cut_model_by_hand() -> None:
    """Half of the heads and channels: half the base, and the cut side of every adapter."""
    tokens = 2 * 9
    layer = 2 * tokens * 24 * (4 * 12 + 2 * 16) + 4 * tokens * 9 * 12
    adapters = 2 * tokens * 4 * (3 * (24 + 12) + 2 * (24 + 16))
    expected = 3 * (2 * 2 * layer + 3 * 2 * adapters)
    assert WORKLOAD.round_flops(HALF, 4) == expected
    assert WORKLOAD.planned_flops(0.5, 4) == pytest.approx(expected)
    assert WORKLOAD.round_flops(HALF, 0) == WORKLOAD.round_flops(FULL, 0) / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", [FULL, HALF, uneven_structure(SHAPE)], ids=["full", "half", "uneven"])
@pytest.mark.parametrize("rank", [1, 4])
def test_forward_flops_are_those_of_the_real_model(
    monkeypatch: pytest.MonkeyPatch, structure: Structure, family: str, rank: int
) -> None:
    """PyTorch counts the matrix products of the cut model; pooler and task head are no part of the formula.

    Nor is it part of it that a head may read one token only.
    """
    monkeypatch.setitem(FAMILIES, family, replace(family_of(family), first_token=None))
    resident = tiny_resident(family, rank=4, attn_implementation="eager")
    resident.mount(structure, narrow(random_arrays(resident, 4), structure, rank, resident.shape))
    batch = {"input_ids": torch.full((2, 9), 7), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        resident.model(**batch)
    pooler_and_head = 2 * 2 * (24 * 24 + 24 * 3) if family in ENCODERS else 2 * 2 * 9 * 24 * 3
    workload, counts = replace(WORKLOAD, shape=resident.shape), structure.counts()
    base = workload.iteration_flops(counts, 0) / 2
    adapters = (workload.iteration_flops(counts, rank) - workload.iteration_flops(counts, 0)) / 3
    assert counter.get_total_flops() == base + adapters + pooler_and_head


def test_work_is_proportional_to_iterations_and_texts() -> None:
    assert replace(WORKLOAD, local_iterations=6).round_flops(HALF, 4) == 2 * WORKLOAD.round_flops(HALF, 4)
    assert replace(WORKLOAD, batch_size=4).round_flops(HALF, 4) == 2 * WORKLOAD.round_flops(HALF, 4)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "phi3", "gpt_neox"])
@pytest.mark.parametrize("targets", [("q", "v"), ("k", "o", "up"), ("q", "v", "o", "up", "down")])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_bytes_are_those_of_the_real_adapters(family: str, targets: tuple[str, ...], rank: int) -> None:
    resident = tiny_resident(family, targets)
    workload = replace(WORKLOAD, shape=resident.shape)
    for ratio, structure in ((0.0, FULL), (0.5, HALF)):
        arrays = narrow(random_arrays(resident), structure, rank, resident.shape)
        assert workload.adapter_bytes(ratio, rank) == nbytes(arrays)


def test_bytes_both_ways() -> None:
    """Adapters and the structure down and up, importance scores up."""
    arrays = narrow(random_arrays(RESIDENT), HALF, 4, SHAPE)
    scores = sum(part.nbytes for layer in random_scores(SHAPE) for part in layer)
    assert WORKLOAD.planned_bytes(0.5, 4) == 2 * (nbytes(arrays) + HALF.nbytes) + scores


def test_a_change_of_the_weights_is_sent_the_smaller_way() -> None:
    """3 attention matrices of 24 x 24 and 2 of 24 x 32 in 2 layers: as factors below rank 12, and 13.7."""
    square, oblong = 24 * 24, 24 * 32
    assert WORKLOAD.change_bytes(4) == 4 * 2 * 4 * (3 * (24 + 24) + 2 * (24 + 32))
    assert WORKLOAD.change_flops(4) == 2 * 2 * 4 * (3 * square + 2 * oblong)
    assert WORKLOAD.change_bytes(13) == 4 * 2 * (3 * square + 2 * 13 * (24 + 32))
    assert WORKLOAD.change_flops(13) == 2 * (3 * square + 2 * 2 * 13 * oblong)
    assert WORKLOAD.change_bytes(100) == 4 * 2 * (3 * square + 2 * oblong)
    assert WORKLOAD.change_flops(100) == 2 * (3 * square + 2 * oblong)
    assert WORKLOAD.change_bytes(0) == WORKLOAD.change_flops(0) == 0


def test_an_uneven_cut_costs_about_what_was_planned() -> None:
    """Selection by importance leaves another number of heads and channels than an even spread."""
    for ratio in (0.2, 0.4, 0.6):
        structure = select(FULL, random_scores(SHAPE), ratio, SHAPE)
        reached = structure.sparsity(SHAPE)
        assert WORKLOAD.round_flops(structure, 4) == pytest.approx(WORKLOAD.planned_flops(reached, 4), rel=0.1)
        arrays = narrow(random_arrays(RESIDENT), structure, 4, SHAPE)
        assert nbytes(arrays) == pytest.approx(WORKLOAD.adapter_bytes(reached, 4), rel=0.1)


@pytest.mark.parametrize("cost", ["planned_flops", "adapter_bytes", "planned_bytes"])
def test_more_sparsity_and_less_rank_cost_less(cost: str) -> None:
    function = getattr(WORKLOAD, cost)
    by_ratio = [function(ratio, 4) for ratio in np.linspace(0.95, 0.0, 20)]
    by_rank = [function(0.3, rank) for rank in (1, 2, 4, 6)]
    for costs in (by_ratio, by_rank):
        assert all(low < high for low, high in pairwise(costs))


def test_memory_falls_with_every_cut_and_rises_with_rank() -> None:
    structures = [FULL]
    for ratio in (0.1, 0.3, 0.5, 0.6):
        structures.append(select(structures[-1], random_scores(SHAPE), ratio, SHAPE))
    needs = [WORKLOAD.memory_bytes(structure, 4) for structure in structures]
    assert all(high > low for high, low in pairwise(needs))
    by_rank = [WORKLOAD.memory_bytes(HALF, rank) for rank in (1, 2, 4, 6)]
    assert all(low < high for low, high in pairwise(by_rank))
    assert replace(WORKLOAD, batch_size=4).memory_bytes(HALF, 4) > WORKLOAD.memory_bytes(HALF, 4)
    assert replace(WORKLOAD, length=18).memory_bytes(HALF, 4) > WORKLOAD.memory_bytes(HALF, 4)


def test_a_language_models_head_and_loss_cost_too() -> None:
    """60 logits per token: their projection forward and backward, and the loss, whatever is cut."""
    tokens = 2 * 9
    language = replace(WORKLOAD, shape=replace(SHAPE, vocabulary=60))
    for structure in (FULL, HALF):
        more = language.round_flops(structure, 4) - WORKLOAD.round_flops(structure, 4)
        assert more == 3 * tokens * 60 * (2 * 2 * 24 + LOSS_FLOPS)
    assert language.planned_flops(0.5, 4) == pytest.approx(language.round_flops(HALF, 4))


def test_gradient_checkpointing_costs_one_more_forward() -> None:
    """Three times the base and four times the adapters, instead of two and three."""
    tokens = 2 * 9
    layer = 2 * tokens * 24 * (4 * 24 + 2 * 32) + 4 * tokens * 9 * 24
    adapters = 2 * tokens * 4 * (3 * (24 + 24) + 2 * (24 + 32))
    expected = 3 * (3 * 2 * layer + 4 * 2 * adapters)
    again = replace(WORKLOAD, gradient_checkpointing=True)
    assert again.round_flops(FULL, 4) == again.planned_flops(0.0, 4) == expected
    plain, again = (replace(each, shape=replace(SHAPE, vocabulary=60)) for each in (WORKLOAD, again))
    once_more = 3 * (2 * layer + 2 * adapters)  # of the layers, not of a language model's head
    assert again.round_flops(FULL, 4) - plain.round_flops(FULL, 4) == once_more


def test_gradient_checkpointing_needs_the_activations_of_the_largest_layer() -> None:
    """And the input of each of the two. An uneven structure: half of the first layer, a quarter of the second."""
    again = replace(WORKLOAD, gradient_checkpointing=True)
    tokens = 2 * 9
    rest = 4 * (sum(p.numel() for p in tiny_model().parameters()) + 4 * ADAPTER_VALUES)
    assert again.memory_bytes(FULL, 4) == pytest.approx(rest + 4 * tokens * (2 * 24 + 24 * 17 + 2 * 4 * 9))
    assert again.memory_bytes(FULL, 4) == pytest.approx(again.planned_memory_bytes(0.0, 4))
    masks = [(np.arange(4) % step == 0, np.arange(32) % step == 0) for step in (2, 4)]
    uneven = Structure.from_masks(masks)
    inside = 4 * tokens * (2 * 24 + 24 * (5 + 12 * 0.5) + 2 * 2 * 9)
    no_activations = WORKLOAD.memory_bytes(uneven, 4) - 4 * tokens * (24 * (10 + 12 * 0.75) + 2 * 3 * 9)
    assert again.memory_bytes(uneven, 4) == pytest.approx(no_activations + inside)


def test_memory_counts_the_attention_of_every_query_head() -> None:
    """Twice the sequence: twice the activations, and twice the attention matrices once more. Groups hold 2 heads."""
    shape = tiny_resident("llama").shape
    short, long = (Workload(shape, 3, 2, length).memory_bytes(FULL, 4) for length in (9, 18))
    tokens = 2 * 9
    activations = 4 * tokens * (2 * 24 * 17 + 2 * 2 * 8 * (2 * 18 - 9))
    assert long - short == pytest.approx(activations)


def test_memory_by_hand() -> None:
    """Weights, four times the adapters, and 17 values per token and unit plus two per attention entry."""
    parameters = sum(parameter.numel() for parameter in tiny_model().parameters())
    tokens = 2 * 9
    weights = 4 * parameters
    adapters = 4 * nbytes(narrow(random_arrays(RESIDENT), FULL, 4, SHAPE))
    activations = 4 * tokens * (2 * 24 * 17 + 2 * 8 * 9)
    assert SHAPE.total_parameters == parameters
    assert WORKLOAD.memory_bytes(FULL, 4) == pytest.approx(weights + adapters + activations)
    cut = 4 * SHAPE.prunable_parameters // 2
    adapters = 4 * nbytes(narrow(random_arrays(RESIDENT), HALF, 4, SHAPE))
    activations = 4 * tokens * (2 * 24 * 11 + 2 * 4 * 9)
    assert WORKLOAD.memory_bytes(HALF, 4) == pytest.approx(weights - cut + adapters + activations)
