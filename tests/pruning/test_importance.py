"""Scores against dense autograd, and the LoRA-gradient identity (oracle 5 of the specification)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedspine.lora.adapters import narrow
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.importance import SCORERS, estimated_gradient
from fedspine.pruning.scoreboard import blend, pruning_scores, update_own, update_shared
from fedspine.structure import Structure
from tests.tiny import TARGETS, random_arrays, tiny_resident, tokens, uneven_structure

LABELS = torch.tensor([0, 1, 2])


def backward(resident: ResidentModel) -> None:
    torch.nn.functional.cross_entropy(resident.model(**tokens()).logits, LABELS).backward()


@pytest.mark.parametrize("family", ["bert", "llama", "phi3", "gpt_neox"])
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_finite_and_zero_where_cut(name: str, family: str) -> None:
    resident = tiny_resident(family)
    structure = uneven_structure(resident.shape)
    resident.mount(structure, narrow(random_arrays(resident), structure, 4, resident.shape))
    scorer = SCORERS[name](resident, 0)
    backward(resident)
    scorer.observe()
    scores = scorer.scores()
    scorer.close()
    for layer, parts in enumerate(scores):
        for part, unit in zip(parts, ("heads", "channels"), strict=True):
            kept = structure.mask(layer, unit)
            assert np.isfinite(part).all()
            assert (part[~kept] == 0).all()
            assert (part[kept] > 0).any()


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("importance", ["magnitude", "l1"])
def test_norms_of_a_unit_are_those_of_its_rows_and_columns(importance: str, family: str) -> None:
    """Grouped and fused, unit by unit: squares in what has adapters, absolute values in every projection."""
    resident = tiny_resident(family)
    structure = uneven_structure(resident.shape)
    resident.mount(structure, narrow(random_arrays(resident), structure, 6, resident.shape))
    scores = SCORERS[importance](resident, 0).scores()
    adapted = {module.name for module in resident.shape.modules}
    modules = resident.shape.modules if importance == "magnitude" else resident.projections
    for layer in range(2):
        for index, unit in enumerate(("heads", "channels")):
            mask = structure.mask(layer, unit)
            for one in np.flatnonzero(mask):
                total = 0.0
                for module in modules:
                    if (module.layer, module.unit) == (layer, unit):
                        merged = resident.weight(module).numpy()
                        if module.name in adapted:
                            a, b, _ = resident.lora(module)
                            merged = merged + (2.0 * b @ a).detach().numpy()
                        part = module.features(np.arange(len(mask)) == one)[module.features(mask)]
                        values = merged[part] if module.axis == "rows" else merged[:, part]
                        total += (values**2).sum() if importance == "magnitude" else np.abs(values).sum()
                assert scores[layer][index][one] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("targets", "layer"), [(TARGETS, 1), (("up", "down"), 0)])
def test_fisher_is_the_squared_mask_gradient_per_example(family: str, targets: tuple[str, ...], layer: int) -> None:
    """Against autograd through explicit mask variables, one example at a time; also below all that trains."""
    resident = tiny_resident(family, targets)
    resident.mount(Structure.full(resident.shape), random_arrays(resident))
    scorer = SCORERS["fisher"](resident, 0)
    backward(resident)
    scorer.observe()
    scores = scorer.scores()
    scorer.close()
    shape, batch = resident.shape, tokens()
    names = {module.role: module.name for module in resident.projections if module.layer == layer}
    for index, (role, count, size) in enumerate((("o", shape.heads, shape.head_dim), ("down", shape.channels, 1))):
        expected = np.zeros(count)
        for row in range(3):
            mask = torch.ones(count, requires_grad=True)
            handle = resident.model.get_submodule(names[role]).register_forward_pre_hook(
                lambda _, inputs, m=mask, s=size: (inputs[0] * m.repeat_interleave(s),)
            )
            one = {key: value[row : row + 1] for key, value in batch.items()}
            loss = torch.nn.functional.cross_entropy(resident.model(**one).logits, LABELS[row : row + 1]) / 3
            (gradient,) = torch.autograd.grad(loss, mask)
            expected += gradient.numpy() ** 2
            handle.remove()
        np.testing.assert_allclose(scores[layer][index], expected, rtol=1e-3, atol=1e-9)


def test_estimated_gradient_is_minus_the_change_of_the_product() -> None:
    torch.manual_seed(0)
    a, b, grad_a, grad_b = torch.randn(3, 7), torch.randn(5, 3), torch.randn(3, 7), torch.randn(5, 3)
    change = (b - grad_b) @ (a - grad_a) - b @ a
    torch.testing.assert_close(estimated_gradient(a, b, grad_a, grad_b), -change, rtol=1e-5, atol=1e-5)


def test_shared_score_does_not_punish_what_others_have_cut() -> None:
    """Two devices agree on what is important; one has cut half. The shared order is that of the truth."""
    truth = np.array([4.0, 3.0, 2.0, 1.0], dtype=np.float32)
    channels = np.arange(6, 0, -1).astype(np.float32)
    full = Structure.from_masks([(np.ones(4, bool), np.ones(6, bool))])
    half = Structure.from_masks([(np.array([False, False, True, True]), np.ones(6, bool))])
    cut = np.where(half.head_mask(0), 10 * truth, 0).astype(np.float32)
    shared = update_shared(None, [(full, ((truth, channels),))])
    assert shared is not None
    merged = update_shared(shared, [(full, ((truth, channels),)), (half, ((cut, channels),))])
    assert merged is not None
    np.testing.assert_allclose(merged[0][0] / merged[0][0][3], truth, rtol=1e-5)
    untouched = update_shared(shared, [(half, ((cut, channels),))])
    assert untouched is not None
    assert (untouched[0][0][:2] == shared[0][0][:2]).all()


def test_whose_score_cuts() -> None:
    ones = ((np.ones(2, np.float32), np.ones(3, np.float32)),)
    own = {4: update_own(None, ((np.array([3, 1], np.float32), np.ones(3, np.float32)),))}
    assert pruning_scores("shared", 4, ones, own, 9) is ones
    assert pruning_scores("own", 4, ones, own, 9) is own[4]
    assert pruning_scores("own", 5, ones, own, 0) is ones
    mixed = pruning_scores("mixed", 4, ones, own, 5)
    assert mixed is not None
    np.testing.assert_allclose(mixed[0][0], [1.25, 0.75])
    assert blend(own[4], ones, 0)[0][0].tolist() == [1.0, 1.0]
