"""What a device need not keep in memory: what it has cut, and activations that can be computed again."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from fedspine.checkpoint import load_state
from fedspine.client_round import evaluate_device, train
from fedspine.config import RunConfig, load_config
from fedspine.devices.measured import LINK_VARIABLE, Link, write_link
from fedspine.group_round import train_group
from fedspine.lora.adapters import kept_features, narrow
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.importance import FisherScorer
from fedspine.pruning.select import select
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.training import LocalOptimizer
from fedspine.types import Action, EvaluateRequest, TrainReply, TrainRequest
from fedspine.workbench import workbench
from tests.small_run import KEYS, rounds, write_data, write_model
from tests.tiny import (
    TARGETS,
    TINY,
    random_arrays,
    random_scores,
    tiny_config,
    tiny_model,
    tiny_resident,
    tokens,
    uneven_structure,
)

LABELS = torch.tensor([0, 1, 2])


def resident_of(family: str, language: bool = False, checkpointing: bool = False) -> ResidentModel:
    model: nn.Module = tiny_model(family)
    if language:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    published = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return ResidentModel(model, family, TARGETS, 6, 2.0, checkpointing=checkpointing, published=published.__getitem__)


def backward(resident: ResidentModel) -> torch.Tensor:
    logits = resident.model(**tokens()).logits
    if logits.ndim == 3:
        logits = logits[:, -1]
    loss = nn.functional.cross_entropy(logits, LABELS)
    torch.autograd.backward(loss)
    return loss


def weight_storages(resident: ResidentModel) -> dict[int, int]:
    """Bytes by storage of all frozen weights that the object holds, mounted or not; biases are kept in any case."""
    held = [weight for weight, _ in resident._base.values()]
    named = resident.model.named_parameters()
    held += [parameter for name, parameter in named if "lora_" not in name and not name.endswith(".bias")]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}


def held(resident: ResidentModel) -> int:
    """Numbers that the object has of the projections' weights."""
    return sum(weight.numel() for weight, _ in resident._base.values())


def held_under(structure: Structure, resident: ResidentModel) -> int:
    full = Structure.full(resident.shape)
    return sum(
        module.d_in * module.d_out * len(kept_features(module, structure)) // len(kept_features(module, full))
        for module in resident.projections
    )


@pytest.mark.parametrize("family", ["bert", "phi3"])
def test_an_owned_model_keeps_only_what_its_structure_keeps(family: str) -> None:
    own, shared = resident_of(family), resident_of(family)
    shape = own.shape
    whole = sum(weight_storages(own).values())
    arrays, structure = random_arrays(own), Structure.full(shape)
    for ratio in (0.0, 0.3, 0.5):
        structure = select(structure, random_scores(shape), ratio, shape)
        for resident, gives_up in ((own, True), (shared, False)):
            resident.mount(structure, narrow(arrays, structure, 6, shape), own=gives_up)
        assert torch.equal(own.model(**tokens()).logits, shared.model(**tokens()).logits)
        cut = held_under(Structure.full(shape), own) - held_under(structure, own)
        assert sum(weight_storages(own).values()) == whole - 4 * cut
    assert sum(weight_storages(shared).values()) > whole
    assert held(own) < held(shared)


def test_an_owned_model_is_cut_in_the_middle_of_training() -> None:
    found = []
    for own in (True, False):
        resident = resident_of("llama")
        shape = resident.shape
        resident.mount(Structure.full(shape), random_arrays(resident), own=own)
        optimizer = LocalOptimizer(resident, 1e-3, 1.0)
        backward(resident)
        optimizer.step()
        optimizer.cut(uneven_structure(shape))
        backward(resident)
        optimizer.step()
        assert held(resident) == held_under(uneven_structure(shape) if own else Structure.full(shape), resident)
        found.append(resident.arrays())
    assert all((found[0][name] == found[1][name]).all() for name in found[1])


@pytest.mark.parametrize("family", list(TINY))
def test_what_was_given_up_is_read_again_where_it_is_kept_again(family: str) -> None:
    """Bit for bit, projection by projection; for one that does not own it too."""
    own, shared = resident_of(family), resident_of(family)
    shape, arrays = own.shape, random_arrays(own)
    most, least = uneven_structure(shape), select(uneven_structure(shape), random_scores(shape), 0.6, shape)
    for structure, gives_up in ((least, True), (most, True), (Structure.full(shape), False), (least, True)):
        narrowed = narrow(arrays, structure, 6, shape)
        own.mount(structure, narrowed, merge=not gives_up, own=gives_up)
        shared.mount(structure, narrowed, merge=not gives_up)
        assert torch.equal(own.model(**tokens()).logits, shared.model(**tokens()).logits)
        assert held(own) == held_under(structure if gives_up else most, own)


def test_what_cannot_be_read_again_is_kept() -> None:
    resident = tiny_resident()
    structure = uneven_structure(resident.shape)
    resident.mount(structure, narrow(random_arrays(resident), structure, 6, resident.shape), own=True)
    assert held(resident) == held_under(Structure.full(resident.shape), resident)
    resident.mount(Structure.full(resident.shape), random_arrays(resident), own=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("parts")
    folders = {"model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}
    return {**KEYS, **folders, "max_rank": 6, "fixed_rank": 4, "prune_interval": 1, "learning_rate": 1e-3}


def request(config: RunConfig, structure: Structure) -> TrainRequest:
    bench = workbench(config.to_json())
    arrays = narrow(random_arrays(bench.resident, 4), structure, 4, bench.shape)
    return TrainRequest(2, 0, Action(0.4, 4), structure, arrays, random_scores(bench.shape), config.to_json())


def assert_equal(ours: TrainReply, theirs: TrainReply) -> None:
    assert ours.structure == theirs.structure
    assert ours.scores is not None
    assert theirs.scores is not None
    for name, array in theirs.arrays.items():
        np.testing.assert_array_equal(ours.arrays[name], array, err_msg=name)
    for mine, others in zip(ours.scores, theirs.scores, strict=True):
        assert all((part == other).all() for part, other in zip(mine, others, strict=True))


def test_a_device_of_its_own_trains_alike_and_reads_again_what_it_gave_up(keys: dict[str, Any]) -> None:
    """A device that failed after a cut is sent the structure from before."""
    config = RunConfig.from_values(keys)
    resident = workbench(config.to_json()).resident
    full = Structure.full(resident.shape)
    sent = request(config, full)
    expected = train(sent)
    assert held(resident) == held_under(full, resident)
    for _ in range(2):
        reply = train(sent, own=True)
        assert_equal(reply, expected)
        assert held(resident) == held_under(reply.structure, resident) < held_under(full, resident)
    narrowed = narrow(sent.arrays, reply.structure, 4, workbench(config.to_json()).shape)
    evaluation = EvaluateRequest(2, 0, reply.structure, narrowed, config.to_json())
    own = evaluate_device(evaluation, own=True)
    workbench.cache_clear()
    assert evaluate_device(evaluation) == own


def test_a_device_measures_its_own_message_only_and_all_of_it(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading what was given up takes its time too; what the process once had is not of the message."""
    monkeypatch.setenv(LINK_VARIABLE, str(tmp_path / "link.json"))
    write_link(Link())
    config = RunConfig.from_values({**keys, "cost": "measured"})
    bench = workbench(config.to_json())
    published, sent = bench.resident._published, request(config, Structure.full(bench.shape))
    assert published
    assert train(sent, own=True).structure != sent.structure
    once_there = np.ones(100_000_000)
    most = once_there.nbytes + psutil.Process().memory_info().rss
    del once_there

    def slowly(name: str) -> torch.Tensor:
        time.sleep(0.5)
        return published(name)

    bench.resident._published = slowly
    report = train(sent, own=True).report
    assert report.compute_seconds > 0.5
    if Path("/proc/self/clear_refs").exists():
        assert 50e6 < report.peak_memory_bytes < most - 400e6


@pytest.mark.parametrize(("family", "language"), [("bert", False), ("llama", False), ("llama", True)])
def test_gradient_checkpointing_gives_the_same_gradients_and_scores(family: str, language: bool) -> None:
    """Bit for bit, on a cut model; also where the last layer computes the first token only."""
    found = []
    for checkpointing in (False, True):
        resident = resident_of(family, language, checkpointing)
        structure = uneven_structure(resident.shape)
        resident.mount(structure, narrow(random_arrays(resident), structure, 6, resident.shape))
        scorer = FisherScorer(resident)
        backward(resident)
        scorer.observe()
        scorer.close()
        gradients = {name: parameter.grad for name, parameter in resident.parameters.items()}
        found.append((gradients, scorer.scores()))
    (plain, plain_scores), (again, again_scores) = found
    assert all(value is not None and value.abs().sum() > 0 for value in plain.values())
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    for layer, parts in enumerate(plain_scores):
        assert all((part == other).all() for part, other in zip(parts, again_scores[layer], strict=True))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_live_no_longer_than_they_are_needed(family: str, checkpointing: bool) -> None:
    """With the scorer on: until the backward pass, or with gradient checkpointing not at all."""
    resident = resident_of(family, checkpointing=checkpointing)
    resident.mount(Structure.full(resident.shape), random_arrays(resident))
    scorer = FisherScorer(resident)
    seen: list[StorageWeakRef] = []

    def remember(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(StorageWeakRef(inputs[0].untyped_storage()))

    for projection in resident.projections:
        if projection.axis == "columns":
            resident.model.get_submodule(projection.name).register_forward_pre_hook(remember)
    logits = resident.model(**tokens()).logits
    gc.collect()
    assert [ref.expired() for ref in seen] == [checkpointing] * 4
    loss = nn.functional.cross_entropy(logits, LABELS)
    torch.autograd.backward(loss)
    gc.collect()
    assert all(ref.expired() for ref in seen)
    assert len(seen) == (8 if checkpointing else 4)
    scorer.observe()
    scorer.close()


def test_a_run_with_gradient_checkpointing_is_the_same_but_for_virtual_time(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    quick = {**keys, "rounds": 2, "policy": "fixed"}
    plain = simulate(out=tmp_path / "plain", **quick)
    again = simulate(out=tmp_path / "again", gradient_checkpointing=True, **quick)
    for ours, theirs in zip(again.records, plain.records, strict=True):
        for mine, other in zip(ours.pulls, theirs.pulls, strict=True):
            assert mine.report.loss_after == other.report.loss_after
            assert mine.report.compute_seconds > other.report.compute_seconds
            assert mine.report.peak_memory_bytes < other.report.peak_memory_bytes
    assert len(rounds(again.directory)) == 2


def test_devices_side_by_side_with_gradient_checkpointing(keys: dict[str, Any]) -> None:
    replies = []
    for checkpointing in (False, True):
        config = RunConfig.from_values({**keys, "gradient_checkpointing": checkpointing})
        shape = workbench(config.to_json()).shape
        replies.append(
            train_group([request(config, each) for each in (Structure.full(shape), uneven_structure(shape))])
        )
    for ours, theirs in zip(*replies, strict=True):
        assert_equal(ours, theirs)


def test_a_run_with_a_global_layer_budget(keys: dict[str, Any], tmp_path: Path) -> None:
    """Every device ends at the target, with layers of unequal size."""
    result = simulate(out=tmp_path / "run", layer_budget="global", **{**keys, "rounds": 4})
    config = load_config(result.directory / "config.toml", {})
    shape = workbench(config.to_json()).shape
    assert result.summary["sparsity_prunable_min"] >= 0.4 - 1e-6
    assert result.summary["sparsity_prunable"] < 0.4 + shape.head_parameters / shape.prunable_parameters
    structures = load_state(result.directory, config, shape).structures
    assert len(structures) == config.devices
    assert any(len(set(structure.counts())) > 1 for structure in structures.values())
