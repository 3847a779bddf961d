"""Slow devices that train the adapters of the top layers only (`slow_layers`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedspine
from fedspine.aggregation import RULES, Update
from fedspine.aggregation.layers import by_layers
from fedspine.client_round import train
from fedspine.config import RunConfig
from fedspine.controller.policy import make_policy
from fedspine.cost import Workload, workload_of
from fedspine.errors import ConfigError
from fedspine.exchange import checked
from fedspine.group_round import train_group
from fedspine.lora.adapters import above, narrow
from fedspine.minilm_shape import minilm_shape
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.types import FAILED, TRAINED, Action, Candidate, Probe, TrainRequest
from fedspine.workbench import workbench
from tests.small_run import KEYS, write_data, write_model
from tests.test_group_round import assert_close
from tests.tiny import random_arrays, random_scores, tiny_resident, uneven_structure

SLOW = RunConfig.from_values({"slow_layers": 2, "policy": "fixed", "local_work": "equal"})
WORKLOAD = workload_of(SLOW, minilm_shape(SLOW))
RESIDENT = tiny_resident()
SHAPE = RESIDENT.shape
FULL = Structure.full(SHAPE)
START = random_arrays(RESIDENT, 6, seed=99)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("parts")
    return {**KEYS, "model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}


def cohort(*seconds_per_flop: float | None) -> list[Candidate]:
    probes = [None if rate is None else Probe(rate, 1e-9, 0, 0) for rate in seconds_per_flop]
    return [Candidate(device, 0.1, 0.1, 0.3, (4, 8, 16), probe) for device, probe in enumerate(probes)]


def test_devices_clearly_slower_than_the_median_train_the_top_layers() -> None:
    chosen = make_policy(SLOW, WORKLOAD).suggest(1, cohort(1e-12, 1.1e-12, 1e-12, 3e-12, None), [], (0, 1))
    assert [action.layers for action in chosen] == [0, 0, 0, 2, 0]
    plain = make_policy(replace(SLOW, slow_layers=0), WORKLOAD).suggest(1, cohort(1e-12), [], (0, 1))
    assert replace(chosen[3], layers=0) == plain[0]
    alike = make_policy(SLOW, WORKLOAD).suggest(1, cohort(1e-12, 1.1e-12, 1e-12), [], (0, 1))
    assert [action.layers for action in alike] == [0, 0, 0]


def test_a_deadline_counts_with_the_shorter_iterations() -> None:
    devices = cohort(1e-12, 1e-12, 1e-12, 3e-12)
    all_layers, top = (
        make_policy(replace(SLOW, local_work="deadline", slow_layers=layers), WORKLOAD).suggest(1, devices, [], (0, 1))
        for layers in (0, 2)
    )
    assert top[3].iterations > all_layers[3].iterations
    assert SLOW.uses_probe


def test_cost_of_the_top_layers() -> None:
    """Below them a forward pass: a third (and a bit) of what training a layer takes; nothing kept for a backward."""
    counts = FULL.counts()
    workload = Workload(SHAPE, local_iterations=4, batch_size=2, length=8)
    for rank in (0, 4):
        whole, top = (workload.iteration_flops(counts, rank, first) for first in (0, 1))
        forward = workload.inference_flops(counts, rank)
        frozen = workload.inference_flops(counts)
        assert whole == pytest.approx(2 * frozen + 3 * (forward - frozen))
        assert top == pytest.approx(whole - (frozen + 2 * (forward - frozen)) / 2)  # one of two equal layers
    share = workload.flops_share(Action(0.3, 4, 2, layers=1))
    assert share == pytest.approx(top / whole / 2)
    assert workload.flops_share(Action(0.3, 4)) == 1.0
    kept = workload.memory_bytes(FULL, 4) - workload.memory_bytes(FULL, 4, 1)
    less = replace(workload, length=1)
    assert kept > less.memory_bytes(FULL, 4) - less.memory_bytes(FULL, 4, 1) > 0


def request_for(config: RunConfig, layers: int, device: int = 1, structure: Structure | None = None) -> TrainRequest:
    bench = workbench(config.to_json())
    structure = structure or Structure.full(bench.shape)
    arrays = narrow(random_arrays(bench.resident, 4), structure, 4, bench.shape)
    action = Action(0.3, 4, layers=layers)
    return TrainRequest(2, device, action, structure, arrays, random_scores(bench.shape), config.to_json())


@pytest.mark.parametrize("importance", ["fisher", "lora-gradient", "magnitude"])
def test_a_local_round_of_the_top_layer(keys: dict[str, Any], importance: str) -> None:
    """Nothing of the layer below is trained, sent or scored; the round is shorter, and the first step is the same."""
    keys = {**keys, "local_iterations": 1, "prune_interval": 1, "clip_norm": 1e6, "importance": importance}
    config = RunConfig.from_values(keys)
    bench = workbench(config.to_json())
    whole, top = (train(request_for(config, layers)) for layers in (0, 1))
    lower = {name for name in whole.arrays if name not in above(whole.arrays, 1, bench.shape)}
    assert lower
    assert top.arrays.keys() == whole.arrays.keys() - lower
    for name, array in top.arrays.items():
        np.testing.assert_allclose(array, whole.arrays[name], rtol=0, atol=1e-6, err_msg=name)
    assert top.scores is not None
    assert whole.scores is not None
    assert not any(part.any() for part in top.scores[0])
    for part, other in zip(top.scores[1], whole.scores[1], strict=True):
        np.testing.assert_allclose(part, other, rtol=1e-5)
    assert top.report.outcome == TRAINED
    for figure in ("compute_seconds", "upload_bytes", "peak_memory_bytes", "update_norm"):
        assert 0 < getattr(top.report, figure) < getattr(whole.report, figure), figure
    assert top.report.download_bytes == whole.report.download_bytes


def test_adapters_below_stay_as_they_were_through_cuts(keys: dict[str, Any]) -> None:
    config = RunConfig.from_values({**keys, "prune_interval": 1})
    bench = workbench(config.to_json())
    request = request_for(config, 1)
    reply = train(request)
    assert reply.structure != request.structure
    received = narrow(random_arrays(bench.resident, 4), reply.structure, 4, bench.shape)
    now = bench.resident.arrays()
    for name in received.keys() - reply.arrays.keys():
        np.testing.assert_array_equal(now[name], received[name], err_msg=name)
    assert any((now[name] != received[name]).any() for name in reply.arrays)


def test_side_by_side_with_devices_that_train_all_layers(keys: dict[str, Any]) -> None:
    config = RunConfig.from_values({**keys, "prune_interval": 1, "learning_rate": 1e-3})
    shape = workbench(config.to_json()).shape
    sent = [request_for(config, 0, 0), request_for(config, 1, 1), request_for(config, 1, 2, uneven_structure(shape))]
    for group in (sent, sent[1:]):
        for ours, theirs in zip(train_group(group), map(train, group), strict=True):
            assert_close(ours, theirs)


def test_a_reply_holds_the_layers_that_were_asked_for(keys: dict[str, Any]) -> None:
    config = RunConfig.from_values(keys)
    shape = workbench(config.to_json()).shape
    whole, top = request_for(config, 0), request_for(config, 1)

    def shapes(structure: Structure, ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in narrow(top.arrays, structure, ranks, shape).items()}

    for request, other in ((whole, top), (top, whole)):
        plain = replace(request, scores=None)
        reply = train(plain)
        assert checked(reply, plain, config, shape, shapes).report.outcome == TRAINED
        wrong = checked(reply, replace(other, scores=None), config, shape, shapes).report
        assert wrong.outcome == FAILED
        assert "absent" in wrong.message or "asked for none" in wrong.message


def update(seed: int, weight: float, first_layer: int = 0) -> Update:
    return Update(weight, FULL, narrow(random_arrays(RESIDENT, 6, seed), FULL, 6, SHAPE), first_layer)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_is_joined_over_those_who_trained_it(rule: str) -> None:
    updates = [update(1, 1.0), update(2, 3.0, 1), update(3, 2.0)]
    joined = by_layers(RULES[rule], START, updates, SHAPE)
    everybody = RULES[rule](START, [replace(each, first_layer=0) for each in updates], SHAPE)
    without = RULES[rule](START, [updates[0], updates[2]], SHAPE)
    assert joined.keys() == START.keys()
    for module in SHAPE.modules:
        for side in "AB":
            name = f"{module.name}.{side}"
            if rule != "het":  # whose weights are norms over the projections
                np.testing.assert_array_equal(joined[name], (everybody if module.layer else without)[name])
    np.testing.assert_array_equal(joined["head.weight"], everybody["head.weight"])


@pytest.mark.parametrize("rule", ["product", "coordinate", "flex", "zero-pad"])
def test_a_layer_that_nobody_trained_stays(rule: str) -> None:
    joined = by_layers(RULES[rule], START, [update(1, 1.0, 1), update(2, 3.0, 1)], SHAPE)
    for name in START.keys() - above(START, 1, SHAPE).keys():
        np.testing.assert_array_equal(joined[name], START[name])


def test_a_structure_above_a_layer() -> None:
    structure = uneven_structure(SHAPE)
    upper = structure.above(1)
    assert upper.counts() == ((0, 0), structure.counts()[1])
    assert structure.above(0) == structure
    assert upper.within(structure)


def test_a_run_is_shorter_and_learns(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "devices.toml").write_text(
        "download_mbps = [200]\nupload_mbps = [100]\n"
        '[[types]]\nname = "fast"\ncount = 3\ngflops = 5\nmemory_mb = 1000\niteration_ms = 1\n'
        '[[types]]\nname = "slow"\ncount = 1\ngflops = 0.01\nmemory_mb = 1000\niteration_ms = 1\n'
    )
    longer = {"rounds": 12, "local_iterations": 20, "learning_rate": 3e-3}  # with which the tiny model learns at all
    same = {**keys, **longer, "population": str(tmp_path / "devices.toml"), "policy": "fixed"}
    top, whole = (simulate(out=tmp_path / str(layers), slow_layers=layers, **same) for layers in (1, 0))
    layers = [pull.action.layers for record in top.records for pull in record.pulls]
    assert set(layers) == {0, 1}
    assert top.summary["virtual_seconds"] < 0.95 * whole.summary["virtual_seconds"]
    assert top.summary["sparsity_prunable"] == pytest.approx(whole.summary["sparsity_prunable"], abs=0.02)
    assert top.summary["device_accuracy_mean"] > 0.65  # chance: 0.5
    slow = [pull.report for record in top.records for pull in record.pulls if pull.action.layers]
    assert np.mean([each.loss_after for each in slow]) < np.mean([each.loss_before for each in slow])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"slow_layers": -1}, "slow_layers"),
        ({"slow_layers": 1, "masks": "own"}, "masks"),
        ({"slow_layers": 1, "importance": "taylor"}, "importance"),
        ({"slow_layers": 1, "trained_factors": "b", "aggregation": "coordinate"}, "trained_factors"),
        ({"slow_layers": 1, "method": "apt"}, "rank_growth"),
    ],
)
def test_what_it_does_not_go_with(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} = "):
        RunConfig.from_values(wrong)


def test_more_layers_than_there_are(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slow_layers = 2: must be below the 2 layers of the model"):
        simulate(out=tmp_path / "run", slow_layers=2, **keys)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="slow_layers = 2: what this costs follows from training"):
        fedspine.schedule(out=tmp_path / "plan", slow_layers=2)
