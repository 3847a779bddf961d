"""Aggregation against dense numpy sums (oracles 1, 2 and 3 of the specification)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedspine.aggregation import RULES, Update
from fedspine.aggregation.product import average, truncate
from fedspine.lora.adapters import kept_features, narrow, widen
from fedspine.structure import ModelShape, ModuleShape, Structure
from fedspine.types import Arrays
from tests.tiny import random_arrays, tiny_resident, uneven_structure

RESIDENT = tiny_resident()
SHAPE = RESIDENT.shape
RANK = 6
FULL = Structure.full(SHAPE)
START = random_arrays(RESIDENT, RANK, seed=99)


def product(arrays: Arrays, module: ModuleShape) -> np.ndarray:
    return arrays[f"{module.name}.B"].astype(np.float64) @ arrays[f"{module.name}.A"].astype(np.float64)


def update(seed: int, weight: float = 1.0, structure: Structure = FULL, rank: int = RANK) -> Update:
    return Update(weight, structure, narrow(random_arrays(RESIDENT, RANK, seed), structure, rank, SHAPE))


@pytest.mark.parametrize("rule", RULES)
def test_one_device_alone_is_the_identity(rule: str) -> None:
    only = update(1)
    result = RULES[rule](START, [only], SHAPE)
    for module in SHAPE.modules:
        np.testing.assert_allclose(product(result, module), product(only.arrays, module), atol=1e-5)
    np.testing.assert_allclose(result["head.weight"], only.arrays["head.weight"], atol=1e-6)


def test_product_is_the_dense_weighted_sum_where_fedit_is_not() -> None:
    """Low-rank updates whose sum fits the rank: the sum of products is exact, the product of sums is not."""
    updates = [update(seed, weight, rank=2) for seed, weight in ((1, 1.0), (2, 3.0), (3, 2.0))]
    zero = {name: np.zeros_like(array) for name, array in START.items()}
    exact, flex, fedit = (RULES[rule](zero, updates, SHAPE) for rule in ("product", "flex", "coordinate"))
    for module in SHAPE.modules:
        dense = sum(u.weight / 6.0 * product(u.arrays, module) for u in updates)
        for sums in (exact, flex):
            np.testing.assert_allclose(product(sums, module), dense, atol=1e-5)
        assert np.abs(product(fedit, module) - dense).max() > 1e-2


def test_flex_forgets_what_the_server_had() -> None:
    """Below the server's rank, from adapters that are not zero: the same sum, and one device alone is the identity."""
    updates = [update(seed, weight, rank=2) for seed, weight in ((1, 1.0), (2, 3.0), (3, 2.0))]
    for some in (updates, updates[:1]):
        result = RULES["flex"](START, some, SHAPE)
        mass = sum(each.weight for each in some)
        for module in SHAPE.modules:
            dense = sum(each.weight / mass * product(each.arrays, module) for each in some)
            np.testing.assert_allclose(product(result, module), dense, atol=1e-5)


def dense_contributor_mean(updates: list[Update], module: ModuleShape, shape: ModelShape) -> np.ndarray:
    """Global product plus the change of every entry, averaged over the devices that keep it."""
    now = product(START, module)
    change, mass = np.zeros_like(now), np.zeros_like(now)
    for item in updates:
        kept = np.zeros(now.shape, bool)
        index = kept_features(module, item.structure)
        kept[(index, slice(None)) if module.axis == "rows" else (slice(None), index)] = True
        rank = item.arrays[f"{module.name}.A"].shape[0]
        start = START[f"{module.name}.B"][:, :rank].astype(np.float64) @ START[f"{module.name}.A"][:rank]
        after = product(widen(item.arrays, item.structure, shape), module)
        change += np.where(kept, item.weight * (after - start), 0.0)
        mass += np.where(kept, item.weight, 0.0)
    return now + change / np.where(mass > 0, mass, 1.0)


def test_product_averages_changes_over_contributors() -> None:
    """Mixed ranks and structures against the dense formula, up to the best approximation at the server's rank."""
    updates = [update(s, 1.0 + s, uneven_structure(SHAPE, s), rank) for s, rank in ((1, 2), (2, 4), (3, 6))]
    result = RULES["product"](START, updates, SHAPE)
    for module in SHAPE.modules:
        dense = dense_contributor_mean(updates, module, SHAPE)
        u, s, vt = np.linalg.svd(dense)
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        np.testing.assert_allclose(product(result, module), best, atol=1e-4)


def test_product_orders_components() -> None:
    b, a = truncate(np.random.default_rng(0).normal(size=(9, 5)), np.random.default_rng(1).normal(size=(5, 7)), 3)
    sizes = np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)
    assert (np.diff(sizes) <= 1e-5).all()


def test_many_joined_factors_come_as_close_as_the_exact_svd() -> None:
    """More joined columns than the matrix has: the randomised path, the same bits every time."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(96, 8)) @ rng.normal(size=(8, 70))
    b = rng.normal(size=(96, 200)).astype(np.float32)
    a = (np.linalg.pinv(b) @ (signal + 0.1 * rng.normal(size=signal.shape))).astype(np.float32)
    u, s, vt = np.linalg.svd(b @ a)
    best = (u[:, :8] * s[:8]) @ vt[:8]
    state = torch.random.get_rng_state()
    found, again = truncate(b, a, 8), truncate(b, a, 8)
    assert (state == torch.random.get_rng_state()).all()
    assert (found[0] == again[0]).all()
    assert (found[1] == again[1]).all()
    np.testing.assert_allclose(found[0] @ found[1], best, atol=1e-3)
    sizes = np.linalg.norm(found[0], axis=0) * np.linalg.norm(found[1], axis=1)
    assert (np.diff(sizes) <= 1e-4).all()


def test_coordinate_does_not_dilute_and_zero_pad_does() -> None:
    """A row that one device keeps: its value whole, or its weight's share of it."""
    structure = uneven_structure(SHAPE, 1)
    alone, other = update(1, 1.0), update(2, 3.0, structure)
    module = next(m for m in SHAPE.modules if m.role == "up")
    gone = np.flatnonzero(~structure.channel_mask(module.layer))
    name = f"{module.name}.B"
    whole = RULES["coordinate"](START, [alone, other], SHAPE)[name][gone]
    diluted = RULES["zero-pad"](START, [alone, other], SHAPE)[name][gone]
    np.testing.assert_allclose(whole, alone.arrays[name][gone], atol=1e-6)
    np.testing.assert_allclose(diluted, 0.25 * alone.arrays[name][gone], atol=1e-6)


@pytest.mark.parametrize("rule", ["product", "coordinate"])
def test_what_nobody_keeps_stays(rule: str) -> None:
    structure = uneven_structure(SHAPE, 1)
    result = RULES[rule](START, [update(1, structure=structure)], SHAPE)
    module = next(m for m in SHAPE.modules if m.role == "up")
    gone = np.flatnonzero(~structure.channel_mask(module.layer))
    if rule == "coordinate":
        assert (result[f"{module.name}.B"][gone] == START[f"{module.name}.B"][gone]).all()
    else:
        dense = dense_contributor_mean([update(1, structure=structure)], module, SHAPE)
        u, s, vt = np.linalg.svd(dense)
        np.testing.assert_allclose(product(result, module), (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-4)


def test_average_is_in_product_space() -> None:
    low = {k: (v[:2] if k.endswith(".A") else v[:, :2] if k.endswith(".B") else v) for k, v in START.items()}
    pad = {k: np.zeros_like(v) for k, v in START.items()}
    for key, value in low.items():
        pad[key][tuple(slice(n) for n in value.shape)] = value
    other = dict(pad)
    for module in SHAPE.modules:
        other[f"{module.name}.B"] = 3.0 * pad[f"{module.name}.B"]
    mean = average(pad, other, 0.75, SHAPE)
    for module in SHAPE.modules:
        np.testing.assert_allclose(product(mean, module), 1.5 * product(pad, module), atol=1e-5)
    np.testing.assert_allclose(mean["head.weight"], START["head.weight"], atol=1e-6)


def test_same_input_same_bits() -> None:
    updates = [update(s, 1.0 + s, uneven_structure(SHAPE, s), rank) for s, rank in ((1, 2), (2, 4))]
    first, second = (RULES["product"](START, updates, SHAPE) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)
