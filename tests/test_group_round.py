"""Devices side by side in one batch against the same devices one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedspine.client_round import train
from fedspine.config import RunConfig
from fedspine.errors import ConfigError
from fedspine.group_round import train_group
from fedspine.lora.adapters import narrow
from fedspine.pruning.select import select
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.types import OUT_OF_MEMORY, TRAINED, Action, TrainReply, TrainRequest
from fedspine.workbench import workbench
from tests.small_run import KEYS, rounds, write_data, write_model
from tests.tiny import random_arrays, random_scores, uneven_structure


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("parts")
    folders = {"model": str(write_model(base / "model")), "data": str(write_data(base / "data", train=90))}
    return {**KEYS, **folders, "devices": 30, "min_classes": 1, "max_rank": 6, "fixed_rank": 4}


def requests(
    config: RunConfig, structures: list[Structure], ranks: list[int], steps: tuple[int, ...] = ()
) -> list[TrainRequest]:
    """Devices with 3 rows each, on adapters and scores drawn at random."""
    bench = workbench(config.to_json())
    arrays = random_arrays(bench.resident, max(ranks))
    return [
        TrainRequest(
            round=2,
            device=device,
            action=Action(0.4, rank, steps[device] if steps else 0),
            structure=structure,
            arrays=narrow(arrays, structure, rank, bench.shape),
            scores=random_scores(bench.shape),
            settings=config.to_json(),
        )
        for device, (structure, rank) in enumerate(zip(structures, ranks, strict=True))
    ]


def assert_close(ours: TrainReply, alone: TrainReply) -> None:
    assert (ours.device, ours.structure) == (alone.device, alone.structure)
    for field in ("outcome", "examples", "compute_seconds", "upload_bytes", "upload_seconds", "peak_memory_bytes"):
        assert getattr(ours.report, field) == getattr(alone.report, field), field
    for field in ("loss_before", "loss_after", "update_norm"):
        assert getattr(ours.report, field) == pytest.approx(getattr(alone.report, field), rel=1e-3), field
    assert ours.arrays.keys() == alone.arrays.keys()
    for name, array in alone.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], array, rtol=0, atol=2e-4, err_msg=name)
    assert (ours.scores is None) == (alone.scores is None)
    for mine, theirs in zip(ours.scores or (), alone.scores or (), strict=True):
        for part, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(part, other, rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("masks", ["shared", "own"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "phi3"])
def test_every_device_gets_what_it_gets_alone(keys: dict[str, Any], tmp_path: Path, masks: str, family: str) -> None:
    """Unequal structures, ranks and numbers of rows; cuts in the middle of the round."""
    if family != "bert":
        keys = {**keys, "model": str(write_model(tmp_path / "model", family=family))}
    config = RunConfig.from_values({**keys, "masks": masks, "prune_interval": 1, "learning_rate": 1e-3, "devices": 29})
    shape = workbench(config.to_json()).shape
    full = Structure.full(shape)
    structures = [full, select(full, random_scores(shape), 0.2, shape), uneven_structure(shape), full]
    sent = requests(config, structures, [6, 4, 5, 4])
    alone = [train(request) for request in sent]
    assert len({reply.report.examples for reply in alone}) > 1
    assert {reply.report.outcome for reply in alone} == {TRAINED}
    assert alone[0].structure != full
    for ours, theirs in zip(train_group(sent), alone, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("masks", "steps"), [("shared", (4, 2, 1, 3)), ("own", (1, 3, 0, 2)), ("shared", (2, 2, 1, 1))]
)
def test_who_does_fewer_iterations_stops(keys: dict[str, Any], masks: str, steps: tuple[int, ...]) -> None:
    """Its adapters, moments, structure, scores and FLOPs stay as they are while the others go on."""
    config = RunConfig.from_values({**keys, "masks": masks, "prune_interval": 1, "learning_rate": 1e-3})
    shape = workbench(config.to_json()).shape
    full = Structure.full(shape)
    sent = requests(config, [full, uneven_structure(shape), full, full], [6, 4, 5, 4], steps)
    for ours, theirs in zip(train_group(sent), map(train, sent), strict=True):
        assert_close(ours, theirs)


def test_logit_adjustment(keys: dict[str, Any]) -> None:
    """Every device has a prior of its own; the probe losses are taken without it."""
    config = RunConfig.from_values({**keys, "logit_adjustment": 1.5, "learning_rate": 1e-3})
    full = Structure.full(workbench(config.to_json()).shape)
    sent = requests(config, [full] * 3, [4, 4, 4])
    plain = [train(replace(request, settings=RunConfig.from_values(keys).to_json())) for request in sent]
    for ours, theirs, without in zip(train_group(sent), map(train, sent), plain, strict=True):
        assert_close(ours, theirs)
        assert theirs.report.loss_before == without.report.loss_before
        assert theirs.report.loss_after != without.report.loss_after


def test_unpruned_and_slower_in_the_second_round(keys: dict[str, Any]) -> None:
    quick = {"target_sparsity": 0.0, "learning_rate": 2e-3, "rounds": 3, "rate_schedule": "cosine"}
    config = RunConfig.from_values({**keys, **quick})
    full = Structure.full(workbench(config.to_json()).shape)
    sent = requests(config, [full] * 3, [4, 4, 4])
    for ours, theirs in zip(train_group(sent), map(train, sent), strict=True):
        assert_close(ours, theirs)


def test_one_out_of_memory_does_not_hinder_the_others(keys: dict[str, Any], tmp_path: Path) -> None:
    population = tmp_path / "devices.toml"
    population.write_text(
        "download_mbps = [20]\nupload_mbps = [10]\n"
        '[[types]]\nname = "board"\ncount = 2\ngflops = 500\nmemory_mb = 1000\n'
        '[[types]]\nname = "watch"\ncount = 1\ngflops = 5\nmemory_mb = 0.01\n'
    )
    config = RunConfig.from_values({**keys, "population": str(population), "devices": 3, "sampled": 3})
    full = Structure.full(workbench(config.to_json()).shape)
    replies = train_group(requests(config, [full] * 3, [4, 4, 4]))
    assert [reply.device for reply in replies] == [0, 1, 2]
    assert sorted(reply.report.outcome for reply in replies) == sorted([TRAINED, TRAINED, OUT_OF_MEMORY])


def test_a_run_is_the_inline_run_up_to_rounding_and_repeats_itself(keys: dict[str, Any], tmp_path: Path) -> None:
    quick = {**keys, "rounds": 3, "learning_rate": 1e-3, "policy": "fixed"}
    first = simulate(out=tmp_path / "a", engine="grouped", **quick)
    again = simulate(out=tmp_path / "b", engine="grouped", **quick)
    inline = simulate(out=tmp_path / "c", **quick)
    assert rounds(first.directory) == rounds(again.directory)
    for ours, theirs in zip(first.records, inline.records, strict=True):
        assert ours.clock_seconds == theirs.clock_seconds
        assert [pull.report.loss_after for pull in ours.pulls] == pytest.approx(
            [pull.report.loss_after for pull in theirs.pulls], rel=1e-2
        )


def test_an_importance_that_is_not_grouped_is_named(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="importance = 'magnitude': engine = 'grouped' measures only 'fisher'"):
        simulate(out=tmp_path / "run", engine="grouped", **{**keys, "importance": "magnitude"})
    assert not (tmp_path / "run").exists()
