"""IA3, prompt and prefix tuning, and LoRA on quantised weights: what they train, and whole cells of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedspine.config import RunConfig
from fedspine.cost import workload_of
from fedspine.data.encode import Batch
from fedspine.errors import FedSpineError
from fedspine.lora.adapters import narrow, start_adapters
from fedspine.lora.resident import ResidentModel
from fedspine.structure import Structure
from fedspine.study.design import Cell, load_study
from fedspine.study.peft_learners import PeftLearner
from fedspine.study.run import plan_study, results, run_study
from fedspine.study.workload import PEFT_LEARNERS, workload_for
from fedspine.training import LocalOptimizer, batch_loss, evaluate, predictions, tune
from tests.small_run import write_data, write_model
from tests.study.test_design import DEVICE, reasons, small_study
from tests.study.test_run import write_study
from tests.tiny import even_structure, tiny_language_model, tiny_model, tokens

RANK = 3
NO_PREFIX = "distilbert", "prefix"
"""Such a cell is struck out."""


def learner_of(
    family: str,
    learner: str,
    compression: str = "none",
    cut: bool = False,
    dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> tuple[PeftLearner, ResidentModel]:
    """With three virtual tokens (or rank 3), on a tiny model."""
    if compression in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
    model = tiny_language_model(family) if keys.get("task") == "causal-lm" else tiny_model(family)
    resident = ResidentModel(model, family, RunConfig.lora_targets, RANK, 2.0, dtype)
    structure = even_structure(resident.shape) if cut else Structure.full(resident.shape)
    arrays = start_adapters(resident.shape, RANK, np.random.default_rng(0)) | resident.head_arrays()
    resident.mount(structure, narrow(arrays, structure, RANK, resident.shape))
    levels = {"learner": learner, "compression": compression, "rank": RANK}
    config = RunConfig(min_rank=RANK, max_rank=RANK, fixed_rank=RANK, **keys)
    return PeftLearner(levels, config, resident), resident


def batch(rows: int = 3) -> Batch:
    inputs = tokens(rows)
    return Batch(inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), None, np.arange(rows) % 3)


@pytest.mark.parametrize(
    ("family", "learner"),
    [(f, who) for f in ("bert", "distilbert", "llama", "phi3") for who in PEFT_LEARNERS if (f, who) != NO_PREFIX],
)
def test_a_learner_trains_what_the_formula_counts_and_nothing_else(family: str, learner: str) -> None:
    one, resident = learner_of(family, learner)
    config = RunConfig(min_rank=1, max_rank=1, fixed_rank=1)
    cell = Cell({"learner": learner, "compression": "none", "rank": RANK}, 0)
    counted = workload_for(cell, config, resident.shape).adapter_bytes(0.0, 0)
    assert 4 * sum(each.numel() for each in one.parameters.values()) == counted
    assert counted > workload_of(config, resident.shape).adapter_bytes(0.0, 0)
    frozen = {name: each.clone() for name, each in one.model.state_dict().items() if name not in one.parameters}
    before = float(batch_loss(one, batch()).detach())
    tune(one, LocalOptimizer(one, 0.03, 1.0), [batch()] * 12)
    after = float(batch_loss(one, batch()).detach())
    assert after < 0.8 * before
    assert all(torch.equal(each, frozen[name]) for name, each in one.model.state_dict().items() if name in frozen)
    own = [name for name in one.parameters if "modules_to_save" not in name]
    assert all(not torch.equal(one.parameters[name], one._start[name]) for name in own)
    one.restart()
    assert float(batch_loss(one, batch())) == before


def test_ia3_begins_as_the_model_itself_also_of_a_cut_one() -> None:
    for cut, family in ((False, "bert"), (True, "bert"), (True, "llama"), (False, "roberta")):
        one, resident = learner_of(family, "ia3", cut=cut)
        with torch.inference_mode():
            torch.testing.assert_close(predictions(one, batch())[0], predictions(resident, batch())[0])


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("learner", ["prompt", "prefix"])
def test_padding_changes_nothing(family: str, learner: str) -> None:
    """A decoder's head reads the last token of the text, behind the prompt."""
    one, _ = learner_of(family, learner)
    inputs = tokens(2)
    with torch.inference_mode():
        together = one.model(**inputs).logits[:1]
        length = int(inputs["attention_mask"][0].sum())
        alone = one.model(**{name: each[:1, :length] for name, each in inputs.items()}).logits
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("learner", PEFT_LEARNERS)
def test_a_language_model_learns_too(learner: str) -> None:
    one, resident = learner_of("llama", learner, task="causal-lm")
    text = replace(batch(), labels=batch().input_ids)
    if learner == "ia3":
        torch.testing.assert_close(predictions(one, text), predictions(resident, text))
    with torch.inference_mode():
        behind = RANK if learner == "prompt" else 0
        logits = one.model(**tokens()).logits[:, behind:-1].flatten(0, 1)
        torch.testing.assert_close(predictions(one, text)[0], logits)
    before = float(batch_loss(one, text).detach())
    tune(one, LocalOptimizer(one, 0.03, 1.0), [text] * 12)
    assert float(batch_loss(one, text).detach()) < before


@pytest.mark.parametrize(("learner", "kind"), [("ia3", "none"), ("prompt", "none"), ("lora", "int8")])
def test_gradients_are_the_same_with_checkpointing(learner: str, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        one, _ = learner_of("bert", learner, kind, gradient_checkpointing=checkpointing)
        batch_loss(one, batch()).backward()  # type: ignore[no-untyped-call]
        gradients.append([each.grad for each in one.parameters.values()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("learner", PEFT_LEARNERS)
def test_bfloat16_trains_float32_adapters(learner: str) -> None:
    one, _ = learner_of("bert", learner, dtype=torch.bfloat16)
    assert {each.dtype for each in one.parameters.values()} == {torch.float32}
    before = float(batch_loss(one, batch()).detach())
    tune(one, LocalOptimizer(one, 0.03, 1.0), [batch()] * 8)
    assert float(batch_loss(one, batch())) < before


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_quantised_weights_learn_with_lora_and_after_an_evaluation_too(family: str, kind: str) -> None:
    one, resident = learner_of(family, "lora", kind)
    whole = predictions(resident, batch())[0].detach()
    error = float((predictions(one, batch())[0] - whole).norm().detach() / whole.norm())
    assert 0 < error < (0.1 if kind == "int8" else 0.7)
    weights = sum(module.d_out * module.d_in for module in resident.projections)
    frozen = [one.model.base_model.model.get_submodule(m.name) for m in resident.projections]
    stored = sum(getattr(layer, "base_layer", layer).weight.nbytes for layer in frozen)
    assert stored == weights * (1.0 if kind == "int8" else 0.5)
    optimizer = LocalOptimizer(one, 0.03, 1.0)
    losses = []
    for _ in range(3):
        losses.append(evaluate(one, [batch()])[1])
        tune(one, optimizer, [batch()] * 4)
        assert all(not torch.equal(each, one._start[name]) for name, each in one.parameters.items() if "lora" in name)
    assert losses[0] > losses[1] > losses[2]


def test_cells_of_new_learners_and_compressions_are_resumed_to_the_same_bits(tmp_path: Path) -> None:
    quantised = '"nf4", ' if find_spec("bitsandbytes") else ""
    write_model(tmp_path / "model", num_hidden_layers=4)
    write_data(tmp_path / "data")
    (tmp_path / "board.toml").write_text(DEVICE.format(100))
    path = write_study(
        tmp_path,
        f'learner = ["lora", "ia3", "prompt", "prefix"]\ncompression = [{quantised}"depth:0.5"]\nbudget = [4]',
    )
    path.write_text(path.read_text().replace("seeds = 2", "seeds = 1"))
    directory = run_study(path, tmp_path / "out")
    first = {result["name"]: result for result in results(directory)}
    plans = {plan.cell.name: plan for plan in plan_study(load_study(path)) if not plan.estimate.infeasible}
    assert set(first) == set(plans)
    for name, result in first.items():
        last, estimate = result["trace"][-1], plans[name].estimate
        assert [point["steps"] for point in result["trace"]] == [2, 4]
        assert set(last) == {
            *("steps", "device_seconds", "upload_bytes", "download_bytes", "peak_memory_bytes", "energy_joules"),
            "value",
        }
        assert last["device_seconds"] == pytest.approx(estimate.seconds)
        assert (last["upload_bytes"], last["energy_joules"]) == (0.0, None)
        assert result["value"] == pytest.approx(np.mean(result["scores"]))
    for name in list(first)[::2]:
        (directory / "cells" / f"{name}.json").unlink()
    run_study(path, directory)
    assert {result["name"]: result for result in results(directory)} == first


def test_what_does_not_go_together_is_struck_out_with_the_remedy(tmp_path: Path) -> None:
    write_model(tmp_path / "model", num_hidden_layers=3)
    write_data(tmp_path / "data")
    (tmp_path / "board.toml").write_text(DEVICE.format(100))
    vary: dict[str, tuple[Any, ...]] = {"learner": ("ia3", "prefix"), "scope": ("federated",)}
    found = reasons(small_study(tmp_path, vary=vary))
    assert found["ia3 federated"] == "FedSpine federates LoRA: use scope = local with learner = ia3"
    assert found["prefix federated"].startswith("FedSpine federates LoRA")
    vary = {"learner": ("ia3", "prompt", "prefix"), "compression": ("width:0.5", "depth:0.4", "fedspine:0.3")}
    found = reasons(small_study(tmp_path, vary=vary))
    assert found["ia3 width:0.5"] == found["prompt width:0.5"] == found["prefix depth:0.4"] == ""
    assert "some are cut: use compression = depth:SHARE" in found["prefix width:0.5"]
    assert found["ia3 fedspine:0.3"] == "FedSpine cuts in a federation: use compression = width:SHARE"
    found = reasons(small_study(tmp_path, vary={"learner": ("ia3", "prompt", "lora"), "rank": (4, 5)}))
    assert "rank = 5 virtual tokens beside max_length = 12" in found["prompt 5"]
    assert [cell for cell, why in found.items() if why] == ["prompt 5"]
    found = reasons(small_study(tmp_path, vary={"learner": ("prefix",)}, fixed={"gradient_checkpointing": True}))
    assert "use gradient_checkpointing = false" in found["prefix"]
    found = reasons(small_study(tmp_path, vary={"compression": ("depth:0.4",), "scope": ("federated", "local")}))
    assert set(found.values()) == {""}


def test_virtual_tokens_cost_time_and_memory(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_data(tmp_path / "data")
    (tmp_path / "board.toml").write_text(DEVICE.format(100))
    study = small_study(tmp_path, vary={"learner": ("ia3", "prefix", "prompt")}, fixed={"rank": 2})
    need = [plan.estimate for plan in plan_study(study)]
    assert need[0].seconds < need[1].seconds < need[2].seconds
    assert need[0].memory_bytes < need[1].memory_bytes < need[2].memory_bytes


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    write_data(tmp_path / "data")
    (tmp_path / "board.toml").write_text(DEVICE.format(100))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FedSpineError, match=r"compression = 'nf4' needs bitsandbytes: pip install 'fedspine\[quant\]'"):
        plan_study(small_study(tmp_path, vary={"compression": ("none", "nf4")}))
