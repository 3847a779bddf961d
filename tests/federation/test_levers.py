"""Levers beyond the paper, all at once, in a whole run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedspine.simulation import RunResult, simulate
from tests.federation.test_resume import Photographer, assert_same_end
from tests.small_run import KEYS, write_data, write_model

LEVERS: dict[str, Any] = {
    "sampling": "speed",
    "roll_call": True,
    "probe": "first",
    "local_work": "deadline",
    "logit_adjustment": 1.0,
    "prune_interval": 1,
}


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


def test_slow_devices_do_less_and_all_take_part(whole: RunResult) -> None:
    pulls = [pull for record in whole.records for pull in record.pulls]
    steps = [pull.action.iterations for pull in pulls]
    assert set(steps) <= {1, 2, 3, 4}
    assert 1 < sum(steps) / len(steps) < 4
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


@pytest.mark.parametrize("round", [2, 4])
def test_a_run_continues_to_the_same_bits(whole: RunResult, tmp_path: Path, round: int) -> None:
    directory = tmp_path / "run"
    shutil.copytree(whole.directory.parent / "album" / str(round), directory)
    simulate(resume=directory)
    assert_same_end(directory, whole.directory)


def test_devices_as_one_batch_do_the_same(keys: dict[str, Any], tmp_path: Path) -> None:
    quick = {**keys, "rounds": 3, "learning_rate": 1e-3, "policy": "fixed"}
    ours, alone = (simulate(out=tmp_path / engine, engine=engine, **quick) for engine in ("grouped", "inline"))
    for mine, theirs in zip(ours.records, alone.records, strict=True):
        assert mine.clock_seconds == theirs.clock_seconds
        assert [pull.action for pull in mine.pulls] == [pull.action for pull in theirs.pulls]
        losses = [[pull.report.loss_after for pull in record.pulls] for record in (mine, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
