"""Baselines of federated LoRA: what they train, send and average, in a small run of each."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedspine.aggregation import RULES, Update
from fedspine.checkpoint import FILE
from fedspine.client_round import begin, train, workbench
from fedspine.config import RunConfig
from fedspine.errors import ConfigError
from fedspine.group_round import train_group
from fedspine.lora.adapters import narrow, nbytes
from fedspine.lora.factors import completed, of_sides, restored, trained_sides
from fedspine.methods import METHODS, SOURCES
from fedspine.report.observer import Silent
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.types import TRAINED, Action, Arrays, RoundRecord, TrainReply, TrainRequest
from tests.small_run import KEYS, rounds, write_data, write_model
from tests.tiny import even_structure


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("baselines")
    given = {**KEYS, "model": str(write_model(base / "model")), "data": str(write_data(base / "data")), "rounds": 2}
    return {key: value for key, value in given.items() if key != "target_sparsity"}  # the preset's


def reply_of(keys: dict[str, Any], round: int, structure: Structure | None = None, **changes: Any) -> TrainReply:
    """The reply of device 1 to the server's start."""
    config = RunConfig.from_values({**keys, **changes})
    bench = workbench(config.to_json())
    structure = structure or Structure.full(bench.shape)
    arrays = narrow(bench.start, structure, config.fixed_rank, bench.shape)
    if config.trained_factors == "b":
        arrays = of_sides(arrays, "B")
    request = TrainRequest(round, 1, Action(0.0, config.fixed_rank), structure, arrays, None, config.to_json())
    return train(request)


def start_of(directory: Path) -> Arrays:
    """The global adapters of a checkpoint."""
    return {k.removeprefix("global/"): v for k, v in load_file(directory / FILE).items() if k.startswith("global/")}


@pytest.mark.parametrize(("method", "sides"), [("ffa-lora", "B B"), ("rolora", "B A"), ("fedit", "AB AB")])
def test_only_the_trained_factor_comes_back(keys: dict[str, Any], method: str, sides: str) -> None:
    for round, side in enumerate(sides.split(), 1):
        reply = reply_of(keys, round, method=method)
        assert {name[-1] for name in reply.arrays if not name.startswith("head.")} == set(side)
        assert reply.report.upload_bytes == nbytes(reply.arrays) + reply.structure.nbytes


def test_a_device_draws_the_fixed_factor_again(keys: dict[str, Any]) -> None:
    """What it was not sent is what the server has, also on a cut structure; and the bytes are those of what was."""
    config = RunConfig.from_values({**keys, "method": "ffa-lora"})
    bench = workbench(config.to_json())
    structure = even_structure(bench.shape, 2, 20)
    whole = narrow(bench.start, structure, 4, bench.shape)
    sent = of_sides(whole, "B")
    local = begin(TrainRequest(1, 0, Action(0.0, 4), structure, sent, None, config.to_json()), bench)
    assert not isinstance(local, TrainReply)
    assert local.request.arrays.keys() == whole.keys()
    assert all((local.request.arrays[name] == whole[name]).all() for name in whole)
    assert local.report.download_bytes == nbytes(sent) + structure.nbytes


def test_adapter_traffic_is_halved(keys: dict[str, Any], tmp_path: Path) -> None:
    lines = {}
    for method in ("fedit", "ffa-lora", "rolora"):
        simulate(out=tmp_path / method, **keys, method=method)
        lines[method] = rounds(tmp_path / method)
    config = RunConfig.from_values({**keys, "method": "fedit"})
    bench = workbench(config.to_json())
    adapters = narrow(bench.start, Structure.full(bench.shape), config.fixed_rank, bench.shape)
    of_a = KEYS["sampled"] * sum(array.nbytes for name, array in adapters.items() if name.endswith(".A"))
    of_b = KEYS["sampled"] * sum(array.nbytes for name, array in adapters.items() if name.endswith(".B"))
    assert of_a == of_b
    for round, fixed_up in enumerate((of_a, of_b)):
        both, ffa, rolora = (lines[method][round] for method in ("fedit", "ffa-lora", "rolora"))
        assert both["uploaded_bytes"] - ffa["uploaded_bytes"] == of_a
        assert both["downloaded_bytes"] - ffa["downloaded_bytes"] == of_a
        assert both["uploaded_bytes"] - rolora["uploaded_bytes"] == fixed_up
        assert both["downloaded_bytes"] == rolora["downloaded_bytes"]
    start, ffa = bench.start, start_of(tmp_path / "ffa-lora")
    assert all((ffa[name] == start[name]).all() for name in start if name.endswith(".A"))
    assert any((ffa[name] != start[name]).any() for name in start if name.endswith(".B"))


@pytest.mark.parametrize("choice", ["b", "alternate", "both"])
def test_averaging_one_factor_averages_the_products(keys: dict[str, Any], choice: str) -> None:
    """Trained devices of different weight: exact to 1e-5 with one factor fixed, and not with both."""
    config = RunConfig.from_values({**keys, "method": "fedit", "trained_factors": choice, "fixed_rank": 16})
    bench = workbench(config.to_json())
    shape, full, current = bench.shape, Structure.full(bench.shape), dict(bench.start)
    for round in (1, 2):
        updates = []
        for device in range(3):
            arrays = of_sides(narrow(current, full, 16, shape), "B" if choice == "b" else "AB")
            reply = train(TrainRequest(round, device, Action(0.0, 16), full, arrays, None, config.to_json()))
            updates.append(Update(1.0 + device, full, completed(reply.arrays, current, full, shape)))
        joined = RULES["coordinate"](current, updates, shape)
        current = restored(joined, current, trained_sides(choice, round))
    errors = []
    for module in shape.modules:
        b, a = f"{module.name}.B", f"{module.name}.A"
        dense = sum(u.weight / 6.0 * u.arrays[b].astype(float) @ u.arrays[a].astype(float) for u in updates)
        errors.append(np.abs(current[b] @ current[a] - dense).max())
    assert max(errors) > 1e-4 if choice == "both" else max(errors) < 1e-5


def test_a_rule_that_mixes_the_factors_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"aggregation = 'product': with trained_factors = 'b' it must be coordinate"):
        RunConfig(trained_factors="b")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "fedit"])
def test_every_preset_trains_resumes_and_repeats(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Killed after the first of two rounds and continued, against a run that nobody disturbed: the same bits."""
    given = {**keys, "method": method, "local_iterations": 2, "prune_interval": 1, "eval_devices": 2}
    monkeypatch.setattr("fedspine.simulation.draw_curves", lambda *_: None)

    class Photographer(Silent):
        def round_done(self, record: RoundRecord) -> None:
            if record.round == 1:
                shutil.copytree(tmp_path / "whole", tmp_path / "again")

    result = simulate(out=tmp_path / "whole", observer=Photographer(), **given)
    simulate(resume=tmp_path / "again")
    assert rounds(tmp_path / "whole") == rounds(tmp_path / "again")
    whole, again = (load_file(tmp_path / name / FILE) for name in ("whole", "again"))
    assert whole.keys() == again.keys()
    assert all((whole[name] == again[name]).all() for name in whole)
    start = workbench(RunConfig.from_values(given).to_json()).start
    assert any((array != start[name]).any() for name, array in start_of(tmp_path / "whole").items())
    assert all(pull.report.outcome == TRAINED for record in result.records for pull in record.pulls)
    target = RunConfig.from_values(given).target_sparsity
    assert result.summary["device_accuracy_mean"] > 0
    assert all(pull.ratio_after >= target - 0.02 for pull in result.records[-1].pulls)


def test_every_preset_has_a_source() -> None:
    assert METHODS.keys() == SOURCES.keys()
    assert METHODS["fedit"] == METHODS["fedavg"]


def test_a_device_goes_on_at_the_rank_that_it_kept(keys: dict[str, Any], tmp_path: Path) -> None:
    """HetLoRA: what was uploaded in the round before is the rank of the next."""
    given = {**keys, "method": "hetlora", "rank_decay": 0.5, "rounds": 6, "devices": 4, "learning_rate": 0.05}
    records = simulate(out=tmp_path / "run", **given).records
    for before, after in pairwise(records):
        assert [p.action.lora_rank for p in after.pulls] == [p.report.rank_after for p in before.pulls]
    pulls = [pull for record in records for pull in record.pulls]
    assert {pull.action.lora_rank for pull in records[0].pulls} == {4, 8, 16}
    assert any(pull.report.rank_after == pull.action.lora_rank / 2 for pull in pulls)


@pytest.mark.parametrize("method", ["ffa-lora", "rolora"])
def test_a_shared_batch_trains_the_same_factor(keys: dict[str, Any], method: str) -> None:
    config = RunConfig.from_values({**keys, "method": method})
    bench = workbench(config.to_json())
    arrays = narrow(bench.start, Structure.full(bench.shape), 8, bench.shape)
    sent = of_sides(arrays, "B" if method == "ffa-lora" else "AB")
    requests = [
        TrainRequest(1, device, Action(0.0, 8), Structure.full(bench.shape), sent, None, config.to_json())
        for device in (0, 1)
    ]
    for ours, theirs in zip(train_group(requests), map(train, requests), strict=True):
        assert ours.arrays.keys() == theirs.arrays.keys()
        assert ours.report.upload_bytes == theirs.report.upload_bytes
        for name, array in theirs.arrays.items():
            np.testing.assert_allclose(ours.arrays[name], array, atol=1e-4)
