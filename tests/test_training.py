"""The local optimiser."""

from __future__ import annotations

import pytest
import torch

from fedspine.config import RunConfig
from fedspine.lora.adapters import HEAD
from fedspine.structure import Structure
from fedspine.training import LocalOptimizer
from tests.tiny import random_arrays, tiny_resident


def test_adapters_and_head_have_their_own_learning_rates() -> None:
    """The first step of Adam moves every value by its learning rate."""
    resident = tiny_resident()
    resident.mount(Structure.full(resident.shape), random_arrays(resident, 4))
    before = resident.arrays()
    config = RunConfig.from_values({"learning_rate": 1e-3, "adapter_rate": "inverse-rank"})
    assert [config.adapter_factor(rank) for rank in (4, 8, 16)] == [2.0, 1.0, 0.5]
    optimizer = LocalOptimizer(resident, 1e-3, 1e6, adapter_rate=2e-3)
    for parameter in resident.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, array in resident.arrays().items():
        rate = 1e-3 if name.startswith(HEAD) else 2e-3
        torch.testing.assert_close(before[name] - array, rate * (array * 0 + 1), rtol=1e-2, atol=1e-6)


def test_learning_rates_of_the_rounds() -> None:
    config = RunConfig.from_values({"learning_rate": 1e-3, "rounds": 4, "rate_schedule": "cosine"})
    assert [config.learning_rate_in(round) for round in (1, 2, 3, 4)] == pytest.approx(
        [1e-3, 8.536e-4, 5e-4, 1.464e-4], rel=1e-3
    )
    stable = RunConfig.from_values({"learning_rate": 1e-3, "rounds": 6, "rate_schedule": "stable-cosine"})
    assert [stable.learning_rate_in(round) for round in (1, 4, 5, 6)] == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])
    constant = RunConfig.from_values({"learning_rate": 1e-3, "rounds": 4, "rate_schedule": "constant"})
    assert {constant.learning_rate_in(round) for round in (1, 2, 3, 4)} == {1e-3}
