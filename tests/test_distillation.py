"""The uncut model teaches the cut one at the end of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedspine.checkpoint import FILE, load_state
from fedspine.config import RunConfig
from fedspine.data.prepared import find, prepare, shared
from fedspine.distillation import TEMPERATURE, distilled, divergence
from fedspine.errors import ConfigError, DataError
from fedspine.federation import ServerState
from fedspine.lora.adapters import kept_features, narrow
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.training import predictions
from fedspine.workbench import Workbench, workbench
from tests.federation.test_resume import assert_same_end
from tests.small_run import KEYS, write_data, write_model
from tests.tiny import even_structure, random_arrays


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("parts")
    folders = {"model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}
    return {**KEYS, **folders, "distill_steps": 40, "public_examples": 32}


def test_the_divergence_is_that_of_softened_shares() -> None:
    student, teacher = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    p, q = (functional.softmax(logits / 2, dim=1) for logits in (teacher, student))
    torch.testing.assert_close(divergence(student, teacher), 4 * (p * (p / q).log()).sum(1).mean())
    assert TEMPERATURE == 2.0


def test_texts_are_set_aside_before_the_rows_are_dealt_out(keys: dict[str, Any]) -> None:
    config = RunConfig.from_values(keys)
    data = prepare(config)
    owned = np.concatenate(data.owned)
    assert len(data.public) == 32
    assert sorted([*owned, *data.public]) == list(range(120))
    with shared(data, config.to_json()):
        found = find(config.to_json())
        assert found is not None
        np.testing.assert_array_equal(found.public, data.public)
    plain = prepare(RunConfig.from_values({**keys, "distill_steps": 0, "public_examples": 0}))
    assert (len(plain.public), len(np.concatenate(plain.owned))) == (0, 120)


def gap(bench: Workbench, structure: Structure, arrays: dict[str, Any], teacher: dict[str, Any]) -> float:
    """Divergence of a cut model from the uncut one on the evaluation set."""
    (batch,) = bench.evaluation_batches(bench.test)
    logits = []
    for kept, adapters in ((structure, arrays), (Structure.full(bench.shape), teacher)):
        bench.resident.mount(kept, narrow(adapters, kept, bench.config.max_rank, bench.shape), merge=True)
        with torch.no_grad():
            logits.append(predictions(bench.resident, batch)[0])
    return float(divergence(*logits))


def test_the_cut_model_comes_nearer_to_the_uncut_one(keys: dict[str, Any]) -> None:
    bench = workbench(RunConfig.from_values(keys).to_json())
    shape = bench.shape
    averaged = random_arrays(bench.resident, 16)
    cut = even_structure(shape, channels=24)
    state = ServerState(6, averaged, averaged, cut)
    taught = distilled(bench, state).distilled
    assert taught is not None
    assert taught.keys() == averaged.keys()
    assert gap(bench, cut, dict(taught), averaged) < 0.5 * gap(bench, cut, averaged, averaged)
    for module in shape.modules:
        gone = np.delete(np.arange(module.d_out if module.axis == "rows" else module.d_in), kept_features(module, cut))
        name, axis = (f"{module.name}.B", 0) if module.axis == "rows" else (f"{module.name}.A", 1)
        before, after = (arrays[name].take(gone, axis) for arrays in (averaged, taught))
        np.testing.assert_array_equal(after, before)


def test_devices_keep_what_was_distilled_and_a_run_ends_the_same_twice(keys: dict[str, Any], tmp_path: Path) -> None:
    run = simulate(out=tmp_path / "run", **keys)
    config = RunConfig.from_values(keys)
    bench = workbench(config.to_json())
    state = load_state(run.directory, config, bench.shape)
    assert state.distilled is state.final
    assert any((state.final[name] != state.averaged[name]).any() for name in state.averaged)
    shutil.copytree(run.directory, tmp_path / "again")
    simulate(resume=tmp_path / "again")
    assert_same_end(tmp_path / "again", run.directory)
    assert (tmp_path / "again" / FILE).is_file()


def test_what_cannot_be_distilled_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="task = 'causal-lm': with distill_steps = 5 it must be classification; or leave distill_steps at 0",
    ):
        RunConfig(task="causal-lm", distill_steps=5)
    with pytest.raises(ConfigError, match="distill_steps = 5: the server needs texts to distill with"):
        RunConfig(distill_steps=5)
    with pytest.raises(DataError, match=r"public_examples = 113: .* 120 training rows .* at most 112 can be set"):
        simulate(out=tmp_path / "run", **{**keys, "public_examples": 113})
    assert not (tmp_path / "run").exists()
