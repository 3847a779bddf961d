"""Baselines of federated LoRA: what they train, send and average, in a small run of each."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedspine import federation
from fedspine.aggregation import RULES, Update
from fedspine.checkpoint import FILE, load_state
from fedspine.client_round import begin, train
from fedspine.config import RunConfig
from fedspine.errors import ConfigError
from fedspine.exporting import export
from fedspine.group_round import train_group
from fedspine.lora.adapters import narrow, nbytes
from fedspine.lora.factors import completed, of_sides, restored, sent, trained_sides
from fedspine.methods import METHODS, SOURCES
from fedspine.report.observer import Silent
from fedspine.schedule_only import schedule
from fedspine.simulation import run_server, simulate
from fedspine.structure import Structure
from fedspine.training import evaluate
from fedspine.types import TRAINED, Action, Arrays, RoundRecord, TrainReply, TrainRequest
from fedspine.workbench import workbench
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
    assert any((array != start.get(name, 0)).any() for name, array in start_of(tmp_path / "whole").items())
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


@pytest.mark.parametrize("method", ["ffa-lora", "rolora", "flora", "fedex-lora", "fedsa-lora"])
def test_a_shared_batch_trains_the_same_factor(keys: dict[str, Any], method: str) -> None:
    config = RunConfig.from_values({**keys, "method": method})
    bench = workbench(config.to_json())
    shape, full = bench.shape, Structure.full(bench.shape)
    rng = np.random.default_rng(0)
    folded = {f"{m.name}.W": 0.02 * rng.normal(size=(m.d_out, m.d_in)).astype(np.float32) for m in shape.modules}
    whole = narrow({**bench.start, **(folded if config.fold != "none" else {})}, full, 8, shape)
    requests = [
        TrainRequest(2, device, Action(0.0, 8), full, sent(whole, config), None, config.to_json(), missed_rank=5)
        for device in (0, 1)
    ]
    for ours, theirs in zip(train_group(requests), map(train, requests), strict=True):
        assert ours.arrays.keys() == theirs.arrays.keys()
        assert ours.report.upload_bytes == theirs.report.upload_bytes
        assert ours.report.compute_seconds == theirs.report.compute_seconds
        assert ours.report.loss_before == pytest.approx(theirs.report.loss_before, rel=1e-4)
        for name, array in theirs.arrays.items():
            np.testing.assert_allclose(ours.arrays[name], array, atol=1e-4)


@pytest.mark.parametrize("policy", ["fixed", "tertile"])
def test_flora_downloads_what_a_device_missed(keys: dict[str, Any], tmp_path: Path, policy: str) -> None:
    """Record by record, by hand: the head, and the factors of all rounds since, or the matrices if they are smaller."""
    ranks = {"min_rank": 1, "fixed_rank": 1, "max_rank": 4}
    given = {**keys, **ranks, "method": "flora", "policy": policy, "devices": 5, "sampled": 2, "rounds": 5}
    bench = workbench(RunConfig.from_values(given).to_json())
    records = simulate(out=tmp_path / "run", **given).records
    shape, fixed = bench.shape, bench.shape.head_bytes + Structure.full(bench.shape).nbytes
    missed = dict.fromkeys(range(5), 0)
    seen, chosen = set(), set()
    for record in records:
        for pull in record.pulls:
            rank = missed[pull.device]
            matrices = [
                4 * min(rank * (module.d_out + module.d_in), module.d_out * module.d_in) for module in shape.modules
            ]
            assert pull.report.download_bytes == sum(matrices) + fixed
            factors = 4 * pull.action.lora_rank * sum(module.d_out + module.d_in for module in shape.modules)
            assert pull.report.upload_bytes == factors + fixed
            seen.add(rank)
            chosen.add(pull.action.lora_rank)
            missed[pull.device] = 0
        for device in missed:
            missed[device] += sum(pull.action.lora_rank for pull in record.pulls)
    assert len(seen) > 2
    assert chosen == ({1} if policy == "fixed" else {1, 2, 4})


def test_flora_draws_its_adapters_anew(keys: dict[str, Any], tmp_path: Path) -> None:
    """On every device and in every round others, of which nothing was sent; B is zero, so that nothing changes."""
    config = RunConfig.from_values({**keys, "method": "flora"})
    bench = workbench(config.to_json())
    full = Structure.full(bench.shape)
    request = TrainRequest(
        1, 0, Action(0.0, 4), full, sent(narrow(bench.start, full, 4, bench.shape), config), None, config.to_json()
    )
    assert all(name.startswith("head.") for name in request.arrays)
    drawn = []
    for round, device in ((1, 0), (1, 1), (2, 0), (1, 0)):
        local = begin(replace(request, round=round, device=device), bench)
        assert not isinstance(local, TrainReply)
        drawn.append(local.request.arrays)
    name = bench.shape.modules[0].name
    first, *others, again = (arrays[f"{name}.A"] for arrays in drawn)
    assert first.shape == (4, bench.shape.modules[0].d_in)
    assert (first == again).all()
    assert all((first != other).any() for other in others)
    assert not any(array.any() for arrays in drawn for key, array in arrays.items() if key.endswith(".B"))


def test_only_a_leaves_a_device(keys: dict[str, Any], tmp_path: Path) -> None:
    """FedSA-LoRA: half of the adapters and no head travel, A is averaged, and everybody goes on with a B of its own."""
    given = {**keys, "method": "fedsa-lora", "devices": 4, "sampled": 3, "rounds": 3, "learning_rate": 1e-3}
    run = simulate(out=tmp_path / "run", **given)
    config = RunConfig.from_values(given)
    bench = workbench(config.to_json())
    shape, full = bench.shape, Structure.full(bench.shape)
    of_a = 4 * config.fixed_rank * sum(module.d_in for module in shape.modules)
    for record in run.records:
        for pull in record.pulls:
            assert pull.report.upload_bytes == pull.report.download_bytes == of_a + full.nbytes
    state = load_state(run.directory, config, shape)
    seen = {pull.device for record in run.records for pull in record.pulls}
    assert state.local.keys() == seen
    parts = [state.local[device] for device in sorted(seen)]
    assert not any(name.endswith(".A") for name in parts[0])
    assert {"head.weight", "head.bias"} <= parts[0].keys()
    for name in parts[0]:
        assert all((one[name] != other[name]).any() for one, other in pairwise(parts))


def test_a_device_goes_on_with_its_own_b(keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request holds the B and the head that it had, and the A of all; at the end that is its model."""
    given = {**keys, "method": "fedsa-lora", "devices": 3, "sampled": 2, "rounds": 4}
    asked: list[TrainRequest] = []
    answered: list[TrainReply] = []
    exchange = federation.train_devices

    def listen(federation: Any, plan: Any, current: Any) -> list[TrainReply]:
        replies = exchange(federation, plan, current)
        asked.extend(plan.requests)
        answered.extend(replies)
        return replies

    monkeypatch.setattr(federation, "train_devices", listen)
    run = simulate(out=tmp_path / "run", **given)
    own: dict[int, Arrays] = {}
    common: dict[int, Arrays] = {}
    for request, reply in zip(asked, answered, strict=True):
        of_a = {name for name in request.arrays if name.endswith(".A")}
        for name, array in own.get(request.device, {}).items():
            assert name in of_a or (request.arrays[name] == array).all()
        assert request.device in own or request.arrays.keys() == of_a
        before = common.setdefault(request.round, request.arrays)
        assert all((request.arrays[name] == before[name]).all() for name in of_a)
        own[request.device] = reply.arrays
    config = RunConfig.from_values(given)
    bench = workbench(config.to_json())
    shape, full = bench.shape, Structure.full(bench.shape)
    state = load_state(run.directory, config, shape)
    accuracies = []
    for device in range(3):
        arrays = {**narrow(bench.start, full, 16, shape), **{k: v for k, v in state.arrays.items() if k[-2:] == ".A"}}
        for name, array in own.get(device, {}).items():
            if name.endswith(".B"):
                arrays[name] = np.pad(array, ((0, 0), (0, 16 - array.shape[1])))
            elif name.startswith("head."):
                arrays[name] = array
        bench.resident.mount(full, arrays, merge=True)
        accuracies.append(evaluate(bench.resident, bench.evaluation_batches(bench.test))[0])
        exported = export(run.directory, out=tmp_path / f"model-{device}", device=device, merge=True)
        assert exported.measured.accuracy == pytest.approx(accuracies[-1])
        bench = workbench(config.to_json())
    assert run.summary["device_accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert run.summary["device_accuracy_min"] == min(accuracies)


def test_own_parts_are_cut_too(keys: dict[str, Any], tmp_path: Path) -> None:
    """FedSA-LoRA on pruned devices: B on the rows that are left."""
    given = {**keys, "method": "fedsa-lora", "target_sparsity": 0.4, "rounds": 4, "devices": 4, "local_iterations": 2}
    run = simulate(out=tmp_path / "run", **given)
    assert all(pull.report.outcome == TRAINED for record in run.records for pull in record.pulls)
    assert run.summary["sparsity_prunable"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
@pytest.mark.parametrize("merge", [False, True])
def test_an_export_has_what_was_folded(keys: dict[str, Any], tmp_path: Path, method: str, merge: bool) -> None:
    run = simulate(out=tmp_path / "run", **keys, method=method)
    config = RunConfig.from_values({**keys, "method": method})
    bench = workbench(config.to_json())
    state = load_state(run.directory, config, bench.shape)
    assert any(array.any() for name, array in state.arrays.items() if name.endswith(".W"))
    bench.resident.mount(state.consensus, narrow(state.averaged, state.consensus, 16, bench.shape), merge=True)
    _, loss, _ = evaluate(bench.resident, bench.evaluation_batches(bench.test))
    measured = export(run.directory, out=tmp_path / "model", merge=merge).measured
    assert measured.loss == pytest.approx(loss, rel=1e-4)
    assert measured.accuracy == run.summary["smoothed_accuracy"]


@pytest.mark.parametrize("method", ["flora", "fedex-lora", "fedsa-lora"])
def test_a_deployment_is_refused(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The simulation keeps for a device what a real one would have to keep itself."""
    monkeypatch.chdir(tmp_path)
    exchange: Any = None
    with pytest.raises(ConfigError, match=r"what a device keeps between rounds is kept by the server of a simulation"):
        run_server(RunConfig.from_values({**keys, "method": method}), exchange)
    assert not list(tmp_path.iterdir())


def test_the_scheduler_alone_does_not_know_what_is_folded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fold = 'all': what this costs follows from training"):
        schedule(out=tmp_path / "run", method="flora")
    assert schedule(out=tmp_path / "run", method="fedsa-lora", rounds=2).summary["rounds"] == 2
