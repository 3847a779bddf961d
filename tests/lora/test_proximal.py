"""FedProx: the gradient by hand, also after a cut; and the grouped engine refuses it."""

from __future__ import annotations

import pytest
import torch

from fedspine.config import RunConfig
from fedspine.errors import ConfigError
from fedspine.group_round import check_groupable, groupable
from fedspine.lora.adapters import narrow
from fedspine.lora.proximal import Proximal
from fedspine.lora.resident import ResidentModel
from fedspine.structure import Structure
from fedspine.training import LocalOptimizer
from tests.tiny import even_structure, random_arrays, tiny_resident, tokens


def backward(resident: ResidentModel) -> None:
    torch.autograd.backward(resident.model(**tokens()).logits.square().mean())


def test_gradient_by_hand_and_after_a_cut() -> None:
    resident = tiny_resident()
    arrays = random_arrays(resident)
    full, cut = Structure.full(resident.shape), even_structure(resident.shape)
    resident.mount(full, arrays)
    proximal = Proximal(resident, 0.25)
    with torch.no_grad():
        for parameter in resident.parameters.values():
            parameter += 0.5
    for structure in (full, cut):
        if structure is cut:
            proximal.cut(cut)
            resident.cut(cut)
        backward(resident)
        before = {name: parameter.grad.clone() for name, parameter in resident.parameters.items()}
        received = narrow(arrays, structure, 6, resident.shape)
        proximal.add_gradients()
        for name, parameter in resident.parameters.items():
            wanted = before[name] + 0.25 * (parameter.detach() - torch.from_numpy(received[name]))
            torch.testing.assert_close(parameter.grad, wanted)
            parameter.grad = None


def test_none_is_the_same_bits_and_some_stays_closer() -> None:
    ends = {}
    for mu in (None, 0.0, 10.0):
        resident = tiny_resident()
        arrays = random_arrays(resident)
        resident.mount(Structure.full(resident.shape), arrays)
        optimizer = LocalOptimizer(resident, 1e-2, 1e3, [Proximal(resident, mu)] if mu is not None else [])
        for _ in range(4):
            backward(resident)
            optimizer.step()
        optimizer.cut(even_structure(resident.shape))
        backward(resident)
        optimizer.step()
        ends[mu] = resident.arrays()
    received = narrow(arrays, resident.structure, 6, resident.shape)
    assert all((ends[None][name] == ends[0.0][name]).all() for name in received)

    def moved(mu: float) -> float:
        return sum(float(((ends[mu][name] - received[name]) ** 2).sum()) for name in received)

    assert moved(10.0) < moved(0.0)


def test_a_shared_batch_has_no_proximal_term() -> None:
    for key, value in (("proximal", 0.1), ("rank_decay", 0.9)):
        config = RunConfig(**{key: value})
        assert not groupable(config)
        with pytest.raises(
            ConfigError, match=rf"{key} = {value}: engine = 'grouped' has no terms beside the loss; use"
        ):
            check_groupable(config)
