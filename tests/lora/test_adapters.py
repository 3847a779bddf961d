"""Adapters between ranks and structures, and parity with PEFT on a model that was cut by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedspine.lora.adapters import narrow, nbytes, rank_of, start_adapters, widen
from fedspine.lora.norms import update_norm
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.families import FAMILIES, head_of
from fedspine.structure import Structure
from tests.tiny import TARGETS, random_arrays, tiny_model, tiny_resident, tokens, uneven_structure


@pytest.mark.parametrize("family", ["bert", "llama", "phi3", "gpt_neox"])
def test_narrow_then_widen_is_a_projection(family: str) -> None:
    resident = tiny_resident(family)
    shape, structure = resident.shape, uneven_structure(resident.shape)
    arrays = random_arrays(resident)
    small = narrow(arrays, structure, 4, shape)
    assert rank_of(small, shape) == 4
    wide = widen(small, structure, shape)
    again = narrow(wide, structure, 4, shape)
    assert all((again[name] == small[name]).all() for name in small)
    assert nbytes(small) < nbytes(arrays)


def test_start_leaves_the_function_unchanged() -> None:
    resident = tiny_resident()
    batch = tokens()
    with torch.no_grad():
        expected = tiny_model()(**batch).logits
    arrays = start_adapters(resident.shape, 6, np.random.default_rng(0)) | resident.head_arrays()
    resident.mount(Structure.full(resident.shape), arrays)
    torch.testing.assert_close(resident.model(**batch).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_peft(family: str) -> None:
    """A mounted model gives the logits and the gradients of stock PEFT around the stock model.

    Also where only the first token leaves the last layer's attention. In float64 but for the head, which is float32 in
    both, so that the bounds need not allow for another order of sums.
    """
    resident = ResidentModel(tiny_model(family), family, TARGETS, 6, 2.0, torch.float64)
    shape, batch, labels, rank = resident.shape, tokens(), torch.tensor([0, 1, 2]), 3
    arrays = narrow(random_arrays(resident), Structure.full(shape), rank, shape)
    resident.mount(Structure.full(shape), arrays)
    stock = get_peft_model(
        tiny_model(family), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[m.name for m in shape.modules])
    ).double()
    for path in head_of(stock.base_model.model, family):
        head = stock.base_model.model.get_submodule(path).float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    for module in shape.modules:
        layer = stock.base_model.model.get_submodule(module.name)
        layer.lora_A["default"].weight.data = torch.from_numpy(arrays[f"{module.name}.A"]).double()
        layer.lora_B["default"].weight.data = torch.from_numpy(arrays[f"{module.name}.B"]).double()
    for model in (resident.model, stock):
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
    torch.testing.assert_close(resident.model(**batch).logits, stock(**batch).logits, rtol=0, atol=1e-6)
    for module in shape.modules:
        layer = stock.base_model.model.get_submodule(module.name)
        for side, part in (("A", layer.lora_A), ("B", layer.lora_B)):
            ours = resident.parameters[f"{module.name}.{side}"].grad
            assert ours is not None
            torch.testing.assert_close(ours.double(), part["default"].weight.grad, rtol=1e-5, atol=1e-7)


MILDER = {"distilbert": (0.3, 0.5), "llama": (0.3, 0.5), "qwen2": (0.3, 0.5)}
"""Spread of the weights and scale of the adapters where a merge of large adapters into weights of eight bits of
precision moves these tiny models' logits, which are of order 1, by more than the bound."""


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_float32_to_its_precision(family: str) -> None:
    """Frozen weights and arithmetic in bfloat16; what trains, and what is sent, in float32."""
    spread, scale = MILDER.get(family, (0.3, 2.0))
    batch, labels = tokens(), torch.tensor([0, 1, 2])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        resident = ResidentModel(tiny_model(family, initializer_range=spread), family, TARGETS, 6, scale, dtype)
        arrays = random_arrays(resident)
        resident.mount(Structure.full(resident.shape), arrays)
        logits = resident.model(**batch).logits
        torch.nn.functional.cross_entropy(logits, labels).backward()
        gradient = torch.cat([p.grad.flatten() for p in resident.parameters.values() if p.grad is not None])
        assert all(p.dtype == torch.float32 for p in resident.parameters.values())
        assert all((resident.arrays()[name] == array).all() for name, array in arrays.items())
        resident.mount(Structure.full(resident.shape), arrays, merge=True)
        with torch.no_grad():
            torch.testing.assert_close(resident.model(**batch).logits, logits, rtol=0.05, atol=0.05)
        found.append((logits.detach(), gradient, next(iter(resident.model.base_model.parameters())).dtype))
    (full, gradient, _), (half, half_gradient, stored) = found
    assert stored == torch.bfloat16
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
    assert torch.cosine_similarity(gradient, half_gradient, dim=0) > 0.99


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "classifier"), ("distilbert", ("pre_classifier", "classifier")), ("llama", "score")]
)
def test_only_adapters_and_head_train(family: str, head: str | tuple[str, ...]) -> None:
    resident = tiny_resident(family)
    resident.mount(Structure.full(resident.shape), random_arrays(resident))
    trainable = {name for name, p in resident.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * len(TARGETS) + len(resident.head_arrays())
    assert all("lora_" in name or name.startswith(head) for name in trainable)


def test_update_norm_is_the_dense_frobenius_norm() -> None:
    resident = tiny_resident()
    shape = resident.shape
    before, after = random_arrays(resident, 4, 1), random_arrays(resident, 4, 2)
    dense = [
        2.0 * (after[f"{m.name}.B"] @ after[f"{m.name}.A"] - before[f"{m.name}.B"] @ before[f"{m.name}.A"])
        for m in shape.modules
    ]
    expected = float(np.sqrt(sum(np.sum(d.astype(np.float64) ** 2) for d in dense)))
    assert abs(update_norm(before, after, shape, 2.0) - expected) < 1e-4 * expected
