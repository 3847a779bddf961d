"""A causal language model in place of a classifier: loss, cuts, costs, a whole run and its figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedspine.config import RunConfig
from fedspine.cost import LOSS_FLOPS, Workload
from fedspine.data.encode import Encoded, evaluation_batches
from fedspine.errors import ConfigError, DataError, ModelError
from fedspine.generation import measure, perplexity
from fedspine.lora.adapters import narrow
from fedspine.lora.resident import ResidentModel
from fedspine.model import load_base
from fedspine.pruning.families import decoders
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.training import batch_loss, evaluate
from tests.pruning.test_surgery import masked_logits
from tests.small_run import BAD, GOOD, KEYS, OTHER, figures, rounds, write_model
from tests.tiny import TARGETS, random_arrays, tiny_language_model, tokens, uneven_structure

RUN = {**KEYS, "task": "causal-lm", "max_length": 16, "rounds": 3, "min_classes": 1}


def resident(family: str) -> ResidentModel:
    return ResidentModel(tiny_language_model(family), family, TARGETS, 6, 2.0)


def texts() -> Encoded:
    """Three rows of random tokens of which the last few are learned."""
    rng = np.random.default_rng(0)
    lengths = np.array([9, 5, 7])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    learned = np.concatenate([np.arange(length) >= start for length, start in zip(lengths, (4, 1, 6), strict=True)])
    return Encoded(rng.integers(5, 60, offsets[-1]), offsets, None, np.zeros(3, dtype=np.int64), learned)


@pytest.mark.parametrize("family", decoders())
def test_loss_is_that_of_transformers(family: str) -> None:
    """Over the learned tokens only, each predicted from those before it."""
    model = resident(family)
    model.mount(Structure.full(model.shape), random_arrays(model))
    (batch,) = evaluation_batches(texts(), 3, pad_id=1)
    inputs = {"input_ids": torch.from_numpy(batch.input_ids), "attention_mask": torch.from_numpy(batch.attention_mask)}
    expected = model.model(**inputs, labels=torch.from_numpy(batch.labels)).loss
    torch.testing.assert_close(batch_loss(model, batch), expected)


@pytest.mark.parametrize("family", decoders())
def test_only_adapters_train(family: str) -> None:
    model = resident(family)
    arrays = random_arrays(model)
    assert not model.head_arrays()
    assert all(name.endswith((".A", ".B")) for name in arrays)
    model.mount(Structure.full(model.shape), arrays)
    assert all("lora_" in name for name, p in model.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", decoders())
def test_cut_equals_masked_before_and_after_a_step(family: str) -> None:
    cut, full = resident(family), resident(family)
    arrays, structure, batch = random_arrays(cut), uneven_structure(cut.shape), tokens()
    cut.mount(structure, narrow(arrays, structure, 6, cut.shape))
    full.mount(Structure.full(full.shape), arrays)
    for step in range(2):
        pair = (cut, cut.model(**batch).logits), (full, masked_logits(full, structure, batch))
        close = {"rtol": 1e-5, "atol": 1e-5} if step == 0 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(pair[0][1], pair[1][1], **close)
        for model, logits in pair:
            optimizer = torch.optim.SGD(list(model.parameters.values()), lr=0.02)
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_evaluation_counts_learned_tokens() -> None:
    """Accuracy and loss by hand, and the same however the rows are batched."""
    model, rows = resident("llama"), texts()
    model.mount(Structure.full(model.shape), random_arrays(model))
    right, losses = 0, []
    for row in range(3):
        part = rows.take(np.array([row]))
        with torch.no_grad():
            logits = model.model(input_ids=torch.from_numpy(part.ids)[None]).logits[0]
        for place in np.flatnonzero(part.learned):
            scores = torch.log_softmax(logits[place - 1], dim=0)
            right += int(scores.argmax() == part.ids[place])
            losses.append(-float(scores[part.ids[place]]))
    for size in (1, 3):
        accuracy, loss, _ = evaluate(model, evaluation_batches(rows, size, pad_id=1))
        assert accuracy == right / len(losses)
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("family", decoders())
def test_costs_include_the_head_over_the_vocabulary(family: str) -> None:
    model = ResidentModel(tiny_language_model(family, attn_implementation="eager"), family, TARGETS, 4, 2.0)
    structure = uneven_structure(model.shape)
    model.mount(structure, narrow(random_arrays(model, 4), structure, 4, model.shape), merge=True)
    workload = Workload(model.shape, local_iterations=1, batch_size=2, length=9)
    batch = {"input_ids": torch.full((2, 9), 7), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(**batch)
    assert counter.get_total_flops() == workload.inference_flops(structure.counts())
    assert workload.planned_flops(0.3, 4) == pytest.approx(
        replace(workload, shape=replace(model.shape, vocabulary=0)).planned_flops(0.3, 4)
        + 2 * 9 * 60 * (2 * 2 * 24 + LOSS_FLOPS)
    )
    without = replace(workload, shape=replace(model.shape, vocabulary=0))
    logits = 4 * 2 * 9 * 2 * 60
    assert workload.memory_bytes(structure, 4) == pytest.approx(without.memory_bytes(structure, 4) + logits)


def write_instructions(path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for row in range(120):
        kind = row % 2
        words = [*rng.choice(OTHER, 2), (GOOD, BAD)[kind][row % 5]]
        lines.append({"instruction": " ".join(words), "response": ("good", "bad")[kind], "category": str(kind)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("language")
    model = write_model(where / "model", family="llama", language=True)
    return {"model": str(model), "data": str(write_instructions(where / "rows.jsonl"))}


def test_a_run_learns_to_answer(tmp_path: Path, folders: dict[str, str]) -> None:
    keys: dict[str, Any] = {**RUN, **folders, "rounds": 6, "generate_examples": 4, "generate_tokens": 3}
    summary = simulate(out=tmp_path / "run", **keys).summary
    assert summary["smoothed_perplexity"] < summary["perplexity_cut_untuned"]
    assert summary["device_accuracy_mean"] > 0.5  # of two tokens each: the answer, and the end
    assert summary["sparsity_prunable"] == pytest.approx(0.4, abs=0.05)
    assert (summary["answers"], summary["answers_exact_match"] <= 1) == (4, True)


def test_a_run_that_is_cut_short_ends_as_if_it_had_not_been(
    tmp_path: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {**RUN, **folders, "partition": "dirichlet"}
    simulate(out=tmp_path / "whole", **keys)

    class Stop(Exception):
        pass

    from fedspine import simulation

    save = simulation.save_state

    def fail(directory: Path, config: RunConfig, state: Any) -> None:
        save(directory, config, state)
        if state.round == 2:
            raise Stop

    monkeypatch.setattr(simulation, "save_state", fail)
    with pytest.raises(Stop):
        simulate(out=tmp_path / "again", **keys)
    monkeypatch.undo()
    simulate(resume=tmp_path / "again")
    assert rounds(tmp_path / "again") == rounds(tmp_path / "whole")
    assert figures(tmp_path / "again") == figures(tmp_path / "whole")


def test_answers_are_measured() -> None:
    found = measure([" the warm room", "good meal"], ["the warm room ", "the good meal"])
    assert found == {"answers": 2, "answers_exact_match": 0.5, "answers_rouge_l": pytest.approx(0.9)}


def test_perplexity_of_a_run_that_diverged() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e9) == math.inf


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is an encoder, and task = 'causal-lm' needs a decoder \(llama, qwen2, "):
        load_base(RunConfig(task="causal-lm", model=str(write_model(tmp_path / "model")), max_length=12), 2)


def test_a_model_without_a_language_head_is_refused(tmp_path: Path) -> None:
    config = RunConfig(task="causal-lm", model=str(write_model(tmp_path / "model", family="qwen2")), max_length=12)
    with pytest.raises(ModelError, match=r"it holds no lm_head\.weight, which task = 'causal-lm' needs"):
        load_base(config, 2)


def test_grouped_devices_are_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="engine = 'grouped' trains classifiers"):
        simulate(out=tmp_path / "run", engine="grouped", **{**RUN, **folders})


def test_answers_need_responses(tmp_path: Path, folders: dict[str, str]) -> None:
    with pytest.raises(DataError, match="there are no instructions with responses"):
        simulate(out=tmp_path / "run", text_column="instruction", generate_examples=2, **{**RUN, **folders})
