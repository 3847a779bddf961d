"""A cut model gives the logits of the full model whose cut structures are masked to zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedspine.lora.adapters import narrow
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.families import FAMILIES, family_of
from fedspine.structure import Structure
from fedspine.training import LocalOptimizer
from tests.tiny import random_arrays, tiny_resident, tokens, uneven_structure


def masked_logits(resident: ResidentModel, structure: Structure, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the mounted full model with the inputs of `o` and `down` masked."""
    handles = []
    for projection in resident.projections:
        if projection.axis == "columns":
            size = resident.shape.head_dim if projection.unit == "heads" else 1
            mask = torch.from_numpy(structure.mask(projection.layer, projection.unit)).repeat_interleave(size)
            module = resident.model.get_submodule(projection.name)
            handles.append(module.register_forward_pre_hook(lambda _, inputs, m=mask: (inputs[0] * m,)))
    logits = resident.model(**batch).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merge", [False, True])
def test_cut_equals_masked(family: str, merge: bool) -> None:
    resident = tiny_resident(family)
    arrays, structure, batch = random_arrays(resident), uneven_structure(resident.shape), tokens()
    resident.mount(Structure.full(resident.shape), arrays)
    expected = masked_logits(resident, structure, batch)
    resident.mount(structure, narrow(arrays, structure, 6, resident.shape), merge=merge)
    torch.testing.assert_close(resident.model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_masked_after_a_step(family: str) -> None:
    """One optimiser step on the cut model and on the masked one leaves them equal: the gradients agree."""
    cut, full = tiny_resident(family), tiny_resident(family)
    arrays, structure, batch = random_arrays(cut), uneven_structure(cut.shape), tokens()
    labels = torch.tensor([0, 1, 2])
    cut.mount(structure, narrow(arrays, structure, 6, cut.shape))
    full.mount(Structure.full(full.shape), arrays)
    for resident, logits in ((cut, cut.model(**batch).logits), (full, masked_logits(full, structure, batch))):
        optimizer = torch.optim.SGD(list(resident.parameters.values()), lr=0.1)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    torch.testing.assert_close(cut.model(**batch).logits, masked_logits(full, structure, batch), rtol=1e-4, atol=1e-5)


def test_head_counts_that_the_code_reads_must_be_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "phi3", replace(family_of("phi3"), head_counts=()))
    with pytest.raises((AssertionError, RuntimeError)):
        test_cut_equals_masked("phi3", False)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "gpt_neox"])
def test_a_cut_decoder_generates_with_a_cache(family: str) -> None:
    """Token by token with a cache of keys and values as in one go; every layer has its own number of heads."""
    resident = tiny_resident(family)
    structure = uneven_structure(resident.shape)
    resident.mount(structure, narrow(random_arrays(resident), structure, 6, resident.shape))
    body, ids = resident.model.base_model, tokens()["input_ids"][1:]
    with torch.no_grad():
        whole = body(ids, use_cache=False).last_hidden_state
        start = body(ids[:, :5], use_cache=True)
        states, cache = [start.last_hidden_state], start.past_key_values
        for place in range(5, ids.shape[1]):
            states.append(body(ids[:, place : place + 1], past_key_values=cache, use_cache=True).last_hidden_state)
    torch.testing.assert_close(torch.cat(states, 1), whole, rtol=1e-4, atol=1e-5)


def test_cutting_in_the_middle_keeps_values_and_moments() -> None:
    resident, reference = tiny_resident(), tiny_resident()
    shape, batch, labels = resident.shape, tokens(), torch.tensor([0, 1, 2])
    arrays, structure = random_arrays(resident), uneven_structure(resident.shape)
    resident.mount(Structure.full(shape), arrays)
    optimizer = LocalOptimizer(resident, 1e-3, 1.0)
    torch.nn.functional.cross_entropy(resident.model(**batch).logits, labels).backward()
    optimizer.step()
    before = resident.arrays()
    moments = {name: optimizer._optimizer.state[p]["exp_avg"].numpy() for name, p in resident.parameters.items()}
    optimizer.cut(structure)
    for name, array in narrow(before, structure, 6, shape).items():
        assert (resident.arrays()[name] == array).all()
    for name, array in narrow(moments, structure, 6, shape).items():
        assert (optimizer._optimizer.state[resident.parameters[name]]["exp_avg"].numpy() == array).all()
    reference.mount(structure, narrow(before, structure, 6, shape))
    torch.testing.assert_close(resident.model(**batch).logits, reference.model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_gets_smaller_and_the_base_stays(family: str) -> None:
    resident = tiny_resident(family)
    full = Structure.full(resident.shape)
    arrays, structure = random_arrays(resident), uneven_structure(resident.shape)

    def frozen() -> int:
        return sum(p.numel() for n, p in resident.model.named_parameters() if "lora_" not in n)

    resident.mount(full, arrays)
    dense, logits = frozen(), resident.model(**tokens()).logits
    resident.mount(structure, narrow(arrays, structure, 6, resident.shape), merge=True)
    cut = resident.shape.prunable_parameters - structure.kept_parameters(resident.shape)
    assert frozen() == dense - cut
    resident.mount(full, arrays)
    torch.testing.assert_close(resident.model(**tokens()).logits, logits, rtol=0, atol=0)


def test_every_array_is_consumed() -> None:
    resident = tiny_resident()
    arrays = random_arrays(resident) | {"bert.misspelt.A": random_arrays(resident)["head.bias"]}
    with pytest.raises(KeyError, match="misspelt"):
        resident.mount(Structure.full(resident.shape), arrays)
    del arrays["bert.misspelt.A"], arrays["head.bias"]
    with pytest.raises(KeyError, match=r"head\.bias"):
        resident.mount(Structure.full(resident.shape), arrays)
