"""Levers beyond the paper, all at once, in a whole run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedspine.checkpoint import load_state
from fedspine.config import load_config
from fedspine.simulation import RunResult, simulate
from fedspine.workbench import workbench
from tests.federation.test_resume import Photographer, assert_same_end
from tests.small_run import KEYS, write_data, write_model

LEVERS: dict[str, Any] = {
    "sampling": "speed",
    "roll_call": True,
    "probe": "first",
    "local_work": "deadline",
    "slow_layers": 1,
    "logit_adjustment": 1.0,
    "wire_dtype": "float16",
    "adapter_rate": "inverse-rank",
    "regrowth": True,
    "prune_interval": 1,
}

STRUCTURE_BYTES = 2 * (1 + 6)
"""Of two layers: a bit for each of up to 8 heads and 48 channels."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("parts")
    (base / "devices.toml").write_text(
        "download_mbps = [200]\nupload_mbps = [100]\n"
        '[[types]]\nname = "fast"\ncount = 3\ngflops = 5\nmemory_mb = 1000\niteration_ms = 1\n'
        '[[types]]\nname = "slow"\ncount = 1\ngflops = 0.1\nmemory_mb = 1000\niteration_ms = 50\n'
    )
    folders = {"model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}
    return {**KEYS, **folders, **LEVERS, "population": str(base / "devices.toml"), "devices": 9}


@pytest.fixture(scope="module")
def whole(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    base = tmp_path_factory.mktemp("levers")
    return simulate(out=base / "run", observer=Photographer(base / "run", base / "album"), **keys)


def test_iterations_fit_the_round_and_all_take_part(whole: RunResult) -> None:
    pulls = [pull for record in whole.records for pull in record.pulls]
    steps = [pull.action.iterations for pull in pulls]
    assert set(steps) <= set(range(1, 9))
    assert min(steps) < 4 < max(steps)
    assert {pull.action.layers for pull in pulls} == {0, 1}
    counts = [sum(pull.device == device for pull in pulls) for device in range(9)]
    assert max(counts) - min(counts) <= 2


def test_a_roll_call_measures_all_devices_once_and_costs_its_time(whole: RunResult) -> None:
    first, *later = whole.records
    assert sorted(first.roll_call) == list(range(9))
    assert not any(record.roll_call for record in later)
    called = first.roll_call.values()
    assert first.round_seconds == pytest.approx(
        max(pull.report.seconds for pull in first.pulls) + max(probe.seconds for probe in called)
    )
    sent = sum(pull.report.download_bytes for pull in first.pulls)
    assert first.downloaded_bytes == sent + sum(probe.bytes for probe in called)
    assert all(pull.probe is None for record in whole.records for pull in record.pulls)


def test_half_the_bytes_of_adapters_and_head_travel_and_little_is_lost(keys: dict[str, Any], tmp_path: Path) -> None:
    same = {
        "policy": "fixed",
        "sampling": "uniform",
        "local_work": "equal",
        "slow_layers": 0,
    }  # the same work, whatever it costs
    common = {**keys, **same, "rounds": 2, "target_sparsity": 0.0, "learning_rate": 1e-3}
    runs = [simulate(out=tmp_path / dtype, **{**common, "wire_dtype": dtype}) for dtype in ("float16", "float32")]
    half, whole = ([pull.report for record in run.records for pull in record.pulls] for run in runs)
    for ours, theirs in zip(half, whole, strict=True):
        for ours_bytes, bytes_ in (
            (ours.upload_bytes, theirs.upload_bytes),
            (ours.download_bytes, theirs.download_bytes),
        ):
            assert 2 * ours_bytes - bytes_ == STRUCTURE_BYTES
        assert ours.loss_after == pytest.approx(theirs.loss_after, rel=1e-2)


def test_devices_end_with_the_same_structure_as_all_were_cut_by_the_last_scores(whole: RunResult) -> None:
    config = load_config(whole.directory / "config.toml", {})
    state = load_state(whole.directory, config, workbench(config.to_json()).shape)
    assert set(state.structures.values()) == {state.consensus}
    assert state.consensus.sparsity(workbench(config.to_json()).shape) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("round", [2, 4])
def test_a_run_continues_to_the_same_bits(whole: RunResult, tmp_path: Path, round: int) -> None:
    directory = tmp_path / "run"
    shutil.copytree(whole.directory.parent / "album" / str(round), directory)
    simulate(resume=directory)
    assert_same_end(directory, whole.directory)


@pytest.mark.parametrize("policy", ["fixed", "random"])
def test_devices_as_one_batch_do_the_same(keys: dict[str, Any], tmp_path: Path, policy: str) -> None:
    quick = {**keys, "rounds": 3, "learning_rate": 1e-3, "policy": policy}
    ours, alone = (simulate(out=tmp_path / engine, engine=engine, **quick) for engine in ("grouped", "inline"))
    for mine, theirs in zip(ours.records, alone.records, strict=True):
        assert mine.clock_seconds == theirs.clock_seconds
        assert [pull.action for pull in mine.pulls] == [pull.action for pull in theirs.pulls]
        losses = [[pull.report.loss_after for pull in record.pulls] for record in (mine, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
