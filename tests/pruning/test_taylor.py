"""Taylor scores against autograd on the frozen weights, and when they are measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedspine.client_round import measures_importance
from fedspine.config import RunConfig
from fedspine.lora.adapters import narrow
from fedspine.pruning.importance import TaylorScorer
from fedspine.structure import Structure
from tests.tiny import even_structure, random_arrays, tiny_resident, tokens


@pytest.mark.parametrize("family", ["bert", "llama", "phi3"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_scores_are_those_of_autograd(family: str, cut: bool) -> None:
    """Dense gradients of every projection's weight, also of `k` of the first layer, which has no adapter."""
    resident = tiny_resident(family, targets=("q", "v", "o", "up", "down"))
    shape = resident.shape
    structure = even_structure(shape) if cut else Structure.full(shape)
    resident.mount(structure, narrow(random_arrays(resident), structure, 6, shape))
    scorer = TaylorScorer(resident)
    torch.autograd.backward(resident.model(**tokens()).logits.square().mean())
    scorer.observe()
    scores = scorer.scores()
    scorer.close()

    frozen = {module.name: resident.weight(module) for module in resident.projections}
    resident.mount(structure, narrow(random_arrays(resident), structure, 6, shape), merge=True)  # ordinary layers
    linears = {name: resident.model.get_submodule(name) for name in frozen}
    weights = {name: getattr(linear, "base_layer", linear).weight.requires_grad_() for name, linear in linears.items()}
    torch.autograd.backward(resident.model(**tokens()).logits.square().mean())
    wanted = [(np.zeros(shape.heads), np.zeros(shape.channels)) for _ in range(shape.layers)]
    for module in resident.projections:
        salience = (weights[module.name].grad * frozen[module.name]).abs()
        features = salience.sum(1 if module.axis == "rows" else 0).numpy()
        units = len(features) // module.unit_size
        parts = np.split(features, np.cumsum([units * size for size in module.segments])[:-1])
        part = wanted[module.layer][0 if module.unit == "heads" else 1]
        part[structure.mask(module.layer, module.unit)] += sum(each.reshape(units, -1).sum(1) for each in parts)
    for found, expected in zip(scores, wanted, strict=True):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-7)


def test_they_change_no_gradient_and_leave_no_hook() -> None:
    resident = tiny_resident()
    gradients = []
    for scored in (False, True, False):
        resident.mount(Structure.full(resident.shape), random_arrays(resident))
        scorer = TaylorScorer(resident) if scored else None
        torch.autograd.backward(resident.model(**tokens()).logits.square().mean())
        gradients.append({name: parameter.grad.clone() for name, parameter in resident.parameters.items()})
        if scorer:
            scorer.close()
    for name, gradient in gradients[0].items():
        assert (gradient == gradients[1][name]).all()
        assert (gradient == gradients[2][name]).all()


def test_measured_in_the_warm_up_only() -> None:
    config = RunConfig(importance="taylor", rounds=30)
    assert [measures_importance(config, round) for round in (1, 3, 4, 30)] == [True, True, False, False]
    assert measures_importance(RunConfig(), 16)
