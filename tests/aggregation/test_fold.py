"""FLoRA and FedEx-LoRA against dense sums (oracles 1 and 2 of the specification), and what a device has missed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedspine.aggregation import RULES, Update
from fedspine.aggregation.fold import folded, missed_ranks
from fedspine.aggregation.product import average
from fedspine.lora.adapters import narrow
from fedspine.structure import ModuleShape
from fedspine.types import FAILED, OUT_OF_MEMORY, TRAINED, Action, Arrays, Pull, Report, RoundRecord
from tests.aggregation.test_rules import FULL, RANK, RESIDENT, SHAPE, START, product, update
from tests.tiny import random_arrays, tiny_resident, tokens, uneven_structure

PAST = {
    f"{module.name}.W": np.random.default_rng([7, index]).normal(size=(module.d_out, module.d_in)).astype(np.float32)
    for index, module in enumerate(SHAPE.modules)
}
EQUAL = [update(seed, 1.0 + seed) for seed in (1, 2, 3)]
MIXED = [update(seed, 1.0 + seed, rank=rank) for seed, rank in ((1, 2), (2, 4), (3, 6))]


def after(choice: str, updates: list[Update], current: Arrays) -> Arrays:
    joined = {**current, **RULES["coordinate"](current, updates, SHAPE)}
    return folded(choice, current, joined, updates, SHAPE)


def whole(arrays: Arrays, module: ModuleShape) -> np.ndarray:
    """What a model has in addition to its frozen weight, over the scale."""
    return arrays.get(f"{module.name}.W", np.float32(0)) + product(arrays, module)


def exact(updates: list[Update], module: ModuleShape) -> np.ndarray:
    total = sum(item.weight for item in updates)
    return np.sum([item.weight / total * product(item.arrays, module) for item in updates], axis=0)


@pytest.mark.parametrize("past", [{}, PAST], ids=["first", "later"])
@pytest.mark.parametrize("choice", ["all", "residual"])
@pytest.mark.parametrize("updates", [EQUAL, MIXED, EQUAL[:1]], ids=["equal", "mixed", "alone"])
def test_the_sum_of_products_is_exact(updates: list[Update], choice: str, past: Arrays) -> None:
    """To 1e-5, where the product of the averages is off by far; W of before stays below it."""
    zero_b = {name: np.zeros_like(array) if name.endswith(".B") else array for name, array in START.items()}
    current = {**(zero_b if choice == "all" else START), **past}
    result = after(choice, updates, current)
    for module in SHAPE.modules:
        before = past.get(f"{module.name}.W", np.zeros((module.d_out, module.d_in)))
        np.testing.assert_allclose(whole(result, module), before + exact(updates, module), atol=1e-5)
        if len(updates) > 1:
            fedit = RULES["coordinate"](current, updates, SHAPE)
            assert np.abs(product(fedit, module) - exact(updates, module)).max() > 1e-2
    total = sum(item.weight for item in updates)
    head = np.sum([item.weight / total * item.arrays["head.weight"] for item in updates], axis=0)
    np.testing.assert_allclose(result["head.weight"], head, atol=1e-6)


def test_flora_leaves_no_adapter_behind() -> None:
    zero_b = {name: np.zeros_like(array) if name.endswith(".B") else array for name, array in START.items()}
    result = after("all", EQUAL, zero_b)
    assert all((result[f"{m.name}.{side}"] == zero_b[f"{m.name}.{side}"]).all() for m in SHAPE.modules for side in "AB")


def test_fedex_averages_the_factors_and_folds_the_rest() -> None:
    """The residual has rank (N - 1) r: p_i (B_i - B) (A_i - A_N), which is how it is sent."""
    few = [update(seed, 1.0 + seed, rank=2) for seed in (1, 2, 3)]
    shares = [item.weight / sum(each.weight for each in few) for item in few]
    result, means = after("residual", few, START), RULES["coordinate"](START, few, SHAPE)
    for module in SHAPE.modules:
        a, b = f"{module.name}.A", f"{module.name}.B"
        assert (result[a] == means[a]).all()
        assert (result[b] == means[b]).all()
        residual = result[f"{module.name}.W"]
        assert np.linalg.matrix_rank(residual, tol=1e-4) == (3 - 1) * 2
        mean = np.sum([share * item.arrays[b] for share, item in zip(shares, few, strict=True)], axis=0)
        last = few[-1].arrays[a]
        sent = zip(shares[:-1], few[:-1], strict=True)
        encoded = sum(share * (item.arrays[b] - mean) @ (item.arrays[a] - last) for share, item in sent)
        np.testing.assert_allclose(residual, encoded, atol=1e-5)


def test_without_folding_nothing_changes() -> None:
    joined = RULES["coordinate"](START, EQUAL, SHAPE)
    assert folded("none", START, joined, EQUAL, SHAPE) is joined


def test_what_was_folded_is_averaged_over_rounds() -> None:
    later = {name: 3.0 * array for name, array in PAST.items()}
    mean = average({**START, **PAST}, {**START, **later}, 0.75, SHAPE)
    for name, array in PAST.items():
        np.testing.assert_allclose(mean[name], 1.5 * array, atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_model_with_it_is_the_model_of_larger_weights(merge: bool, cut: bool) -> None:
    """Mounted cut, or cut in the middle of training; and nothing of it is left at the next mount."""
    arrays, structure, batch = random_arrays(RESIDENT), uneven_structure(SHAPE), tokens()
    other = tiny_resident()
    with torch.no_grad():
        for module in SHAPE.modules:
            other._base[module.name][0].add_(torch.from_numpy(PAST[f"{module.name}.W"]), alpha=other.scale)
    end = structure if cut else FULL
    other.mount(end, narrow(arrays, end, RANK, SHAPE))
    expected = other.model(**batch).logits
    RESIDENT.mount(end, narrow({**arrays, **PAST}, end, RANK, SHAPE), merge=merge)
    torch.testing.assert_close(RESIDENT.model(**batch).logits, expected, rtol=0, atol=2e-5)
    assert not any(name.endswith(".W") for name in RESIDENT.arrays())
    if cut and not merge:
        RESIDENT.mount(FULL, {**arrays, **PAST})
        RESIDENT.cut(structure)
        torch.testing.assert_close(RESIDENT.model(**batch).logits, expected, rtol=0, atol=2e-5)
    RESIDENT.mount(end, narrow(arrays, end, RANK, SHAPE))
    assert (RESIDENT.model(**batch).logits - expected).abs().max() > 1e-2


def test_missed_ranks_by_hand() -> None:
    """Devices 0 to 4: trained in rounds 1 and 3, in 2, without memory in 2, out of reach in 3, never asked."""

    def pull(device: int, outcome: str, rank: int) -> Pull:
        reached = outcome != FAILED
        report = Report(outcome, download_bytes=9 if reached else 0, rank_after=rank if outcome == TRAINED else 0)
        return Pull(1, device, Action(0.0, 8), 0.0, 0.0, report, 1.0)

    rounds = (
        [pull(0, TRAINED, 8), pull(7, TRAINED, 8)],
        [pull(1, TRAINED, 4), pull(2, OUT_OF_MEMORY, 0), pull(8, TRAINED, 8), pull(9, TRAINED, 8)],
        [pull(0, TRAINED, 8), pull(3, FAILED, 0)],
    )
    record = RoundRecord(0, 0.0, (), 1.0, 1.0, 0.0, 0, 0)
    records = [replace(record, round=number, pulls=tuple(pulls)) for number, pulls in enumerate(rounds, 1)]
    assert missed_ranks("all", records, range(5)) == [8, 20 + 8, 20 + 8, 16 + 20 + 8, 16 + 20 + 8]
    assert missed_ranks("residual", records, range(5)) == [0, 16, 16, 8 + 16, 8 + 16]
    assert missed_ranks("none", records, range(5)) == [0] * 5
    assert missed_ranks("all", (), range(2)) == [0, 0]
