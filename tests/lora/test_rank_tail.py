"""HetLoRA's self-pruning: the gradient against autograd, and when components are dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedspine.lora.rank_tail import LAMBDA, RankTail, kept_rank
from fedspine.structure import Structure
from tests.tiny import random_arrays, tiny_resident


@pytest.mark.parametrize("trained", ["AB", "B"])
def test_gradient_is_that_of_the_term(trained: str) -> None:
    resident = tiny_resident()
    resident.mount(Structure.full(resident.shape), random_arrays(resident), trained=trained)
    tail = RankTail(resident, 4)
    factors = {name: value for name, value in resident.parameters.items() if not name.startswith("head.")}
    copies = {name: value.detach().clone().requires_grad_() for name, value in factors.items()}
    products = [copies[f"{m.name}.B"][:, 4:].norm() * copies[f"{m.name}.A"][4:].norm() for m in resident.shape.modules]
    term = torch.stack(products).sum()
    assert tail.size() == pytest.approx(term.item(), rel=1e-5)
    torch.autograd.backward(LAMBDA * term)
    for name, value in factors.items():
        value.grad = torch.ones_like(value) if name[-1] in trained else None
    tail.add_gradients()
    for name, value in factors.items():
        if name[-1] in trained:
            torch.testing.assert_close(value.grad, 1.0 + copies[name].grad)
        else:
            assert value.grad is None


def test_a_tail_that_became_smaller_goes() -> None:
    resident = tiny_resident()
    resident.mount(Structure.full(resident.shape), random_arrays(resident))
    tail = RankTail(resident, 4)
    arrays = resident.arrays()
    assert tail.dropped(arrays) is arrays
    with torch.no_grad():
        for name, value in resident.parameters.items():
            if name.endswith(".B"):
                value[:, 4:] *= 0.9
    for name, array in tail.dropped(resident.arrays()).items():
        wanted = arrays[name]
        if not name.startswith("head."):
            wanted = wanted[:4] if name.endswith(".A") else wanted[:, :4]
        np.testing.assert_array_equal(array, wanted)


def test_at_the_start_nothing_is_dropped_and_no_gradient_is_undefined() -> None:
    """B is zero, and so is every product."""
    resident = tiny_resident()
    arrays = {k: np.zeros_like(v) if k.endswith(".B") else v for k, v in random_arrays(resident).items()}
    resident.mount(Structure.full(resident.shape), arrays)
    tail = RankTail(resident, 4)
    for value in resident.parameters.values():
        value.grad = torch.zeros_like(value)
    tail.add_gradients()
    assert all(value.grad.isfinite().all() for value in resident.parameters.values())
    assert tail.dropped(resident.arrays())[f"{resident.shape.modules[0].name}.A"].shape[0] == 6


def test_a_rank_shrinks_by_steps_and_not_below_the_least() -> None:
    ranks = [16]
    while kept_rank(ranks[-1], 0.99, 4) < ranks[-1]:
        ranks.append(kept_rank(ranks[-1], 0.99, 4))
    assert ranks == list(range(16, 3, -1))
    assert kept_rank(16, 0.5, 4) == 8
    assert kept_rank(4, 0.5, 4) == 4
