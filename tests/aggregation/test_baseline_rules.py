"""The rules of LoRA-FAIR, HetLoRA and FedMP against dense formulas."""

from __future__ import annotations

import numpy as np
import pytest

from fedspine.aggregation import RULES, Update
from fedspine.aggregation.fair import LAMBDA
from fedspine.lora.adapters import kept_features, narrow, widen
from fedspine.lora.norms import product_norm
from fedspine.structure import ModuleShape
from tests.aggregation.test_rules import FULL, RANK, RESIDENT, SHAPE, START, product, update
from tests.tiny import random_arrays, uneven_structure

MIXED = [update(seed, 1.0 + seed, uneven_structure(SHAPE, seed), rank) for seed, rank in ((1, 2), (2, 4), (3, 6))]


def contributor_product(updates: list[Update], module: ModuleShape) -> tuple[np.ndarray, np.ndarray]:
    """(every entry of the products, averaged over the devices that keep it; where anybody does), dense."""
    total, mass = np.zeros((2, module.d_out, module.d_in))
    for item in updates:
        kept = np.zeros(total.shape, bool)
        index = kept_features(module, item.structure)
        kept[(index, slice(None)) if module.axis == "rows" else (slice(None), index)] = True
        total += np.where(kept, item.weight * product(widen(item.arrays, item.structure, SHAPE), module), 0.0)
        mass += np.where(kept, item.weight, 0.0)
    return total / np.where(mass > 0, mass, 1.0), mass > 0


@pytest.mark.parametrize("updates", [[update(seed, 1.0 + seed) for seed in (1, 2, 3)], MIXED], ids=["equal", "mixed"])
def test_fair_is_the_minimum_of_its_objective(updates: list[Update]) -> None:
    """Closed form against a dense least-squares problem; never further from the average product than the means."""
    fair, means = (RULES[rule](START, updates, SHAPE) for rule in ("fair", "coordinate"))
    for module in SHAPE.modules:
        dense, known = contributor_product(updates, module)
        b_name, a_name = f"{module.name}.B", f"{module.name}.A"
        assert (fair[a_name] == means[a_name]).all()
        b, a = means[b_name].astype(float), means[a_name].astype(float)
        wanted = b.copy()
        for row in range(module.d_out):  # one ridge regression per row, by least squares on a joined system
            left = np.concatenate([(a * known[row]).T, np.sqrt(LAMBDA) * np.eye(RANK)])
            right = np.concatenate([(dense[row] - b[row] @ a) * known[row], np.zeros(RANK)])
            wanted[row] += np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(fair[b_name], wanted, atol=1e-4)
        before, after = (np.linalg.norm((dense - product(arrays, module)) * known) for arrays in (means, fair))
        assert after < before


def test_fair_with_a_common_a_is_exact() -> None:
    updates = []
    for seed in (1, 2, 3):
        arrays = {
            name: START[name] if name.endswith(".A") else array
            for name, array in random_arrays(RESIDENT, RANK, seed).items()
        }
        updates.append(Update(1.0 + seed, FULL, narrow(arrays, FULL, RANK, SHAPE)))
    result = RULES["fair"](START, updates, SHAPE)
    for module in SHAPE.modules:
        np.testing.assert_allclose(product(result, module), contributor_product(updates, module)[0], atol=1e-5)


def test_het_weighs_by_the_norm_of_the_products() -> None:
    updates = [update(seed, 1.0, rank=rank) for seed, rank in ((1, 2), (2, 4), (3, 6))]
    norms = [np.sqrt(sum(np.sum(product(item.arrays, m) ** 2) for m in SHAPE.modules)) for item in updates]
    for item, norm in zip(updates, norms, strict=True):
        assert product_norm(item.arrays, SHAPE) == pytest.approx(norm, rel=1e-9)
    result = RULES["het"](START, updates, SHAPE)
    name = f"{SHAPE.modules[0].name}.A"
    wanted = sum(
        norm / sum(norms) * np.pad(item.arrays[name], ((0, RANK - len(item.arrays[name])), (0, 0)))
        for item, norm in zip(updates, norms, strict=True)
    )
    np.testing.assert_allclose(result[name], wanted, atol=1e-6)
    heads = np.mean([item.arrays["head.weight"] for item in updates], axis=0)
    np.testing.assert_allclose(result["head.weight"], heads, atol=1e-6)


def test_het_before_anybody_has_moved() -> None:
    """B is zero everywhere, so are all norms: the plain average, and no division by zero."""
    arrays = {name: np.zeros_like(array) if name.endswith(".B") else array for name, array in START.items()}
    updates = [Update(weight, FULL, arrays) for weight in (1.0, 3.0)]
    result = RULES["het"](START, updates, SHAPE)
    assert all(np.allclose(result[name], arrays[name]) for name in arrays)


def test_r2sp_recovers_with_the_global_values() -> None:
    """Every device completed in full coordinates, then averaged, dense."""
    result = RULES["r2sp"](START, MIXED, SHAPE)
    total = sum(item.weight for item in MIXED)
    for module in SHAPE.modules:
        for side in "AB":
            name = f"{module.name}.{side}"
            wanted = np.zeros_like(START[name], dtype=float)
            for item in MIXED:
                whole = START[name].astype(float)
                own = widen(item.arrays, item.structure, SHAPE)[name]
                index = kept_features(module, item.structure)
                rank = own.shape[0 if side == "A" else 1]
                cut = side == ("B" if module.axis == "rows" else "A")
                features = index if cut else np.arange(whole.shape[1 if side == "A" else 0])
                place = np.ix_(range(rank), features) if side == "A" else np.ix_(features, range(rank))
                whole[place] = own[place]
                wanted += item.weight / total * whole
            np.testing.assert_allclose(result[name], wanted, atol=1e-5)
