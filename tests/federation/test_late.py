"""Rounds that close before their last reply."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fedspine
from fedspine.aggregation import RULES, Update
from fedspine.config import RunConfig
from fedspine.errors import ConfigError
from fedspine.late import Awaited, close_round
from fedspine.methods import PLAIN
from fedspine.simulation import RunResult, run_server, simulate
from fedspine.structure import ModelShape
from fedspine.types import FAILED, TRAINED, Action, Array, Arrays, Pull, Report
from tests.federation.test_resume import Photographer, assert_same_end
from tests.small_run import KEYS, write_data, write_model

EARLY: dict[str, Any] = {"close_at": 0.5, "max_staleness": 1, "rounds": 10, "sampling": "speed", "policy": "fixed"}


def sent(device: int, seconds: float, outcome: str = TRAINED, round: int = 3) -> Awaited:
    return Awaited(Pull(round, device, Action(0.0, 4), 0.0, 0.0, Report(outcome, 12), 1.0), seconds)


def test_a_round_closes_when_enough_have_trained() -> None:
    asked = [sent(0, 5.0), sent(1, 1.0, FAILED), sent(2, 2.0), sent(3, 4.0), sent(4, 9.0, FAILED)]
    earlier = [sent(7, 1.5, round=1), sent(8, 6.0, round=2)]
    closing = close_round(0.4, asked, earlier)
    assert closing.seconds == 4.0
    assert [each.pull.device for each in closing.arrived] == [7, 1, 2, 3]
    assert closing.waiting_seconds == pytest.approx((2.5 + 3.0 + 2.0 + 0.0) / 4)
    assert [(each.pull.device, each.seconds) for each in closing.late] == [(8, 2.0), (0, 1.0), (4, 5.0)]
    assert close_round(0.9, asked, []).seconds == 5.0  # three have trained: more will not come
    everyone = close_round(1.0, asked, [])
    assert (everyone.seconds, everyone.late) == (9.0, ())


def test_weight_falls_with_staleness() -> None:
    late = sent(0, 1.0, round=3)
    assert [late.discount(round, 3) for round in (3, 4, 6, 7)] == [1.0, pytest.approx(0.5**0.5), 0.5, 0.0]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("parts")
    folders = {"model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}
    return {**KEYS, **folders, "devices": 12}


@pytest.fixture(scope="module")
def updates() -> list[list[float]]:
    """The weights of the updates of every round that was joined."""
    return []


@pytest.fixture(scope="module")
def early(keys: dict[str, Any], updates: list[list[float]], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run, with its state after every round in `album` beside it."""
    base = tmp_path_factory.mktemp("early")
    rule = RULES["product"]

    def watched(current: Arrays, joined: Sequence[Update], shape: ModelShape) -> dict[str, Array]:
        updates.append([update.weight for update in joined])
        return rule(current, joined, shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, "product", watched)
        observer = Photographer(base / "run", base / "album")
        return simulate(out=base / "run", observer=observer, **{**keys, **EARLY})


def test_late_replies_come_in_later_and_their_devices_are_left_alone(early: RunResult) -> None:
    records = early.records
    late = [pull for record in records for pull in record.pulls if pull.round < record.round]
    assert len(late) == early.summary["late_replies"] > 5
    assert any(record.round - pull.round > 1 for record in records for pull in record.pulls)
    asked = [(pull.round, pull.device) for record in records for pull in record.pulls]
    assert len(asked) == len(set(asked))
    busy: dict[int, int] = {}
    for record in records:
        for pull in record.pulls:
            assert busy.get(pull.device, 0) < pull.round, "it was asked while it was busy"
            busy[pull.device] = record.round
    assert all(record.waiting_seconds >= 0 for record in records)


def test_the_weights_are_examples_discounted_and_the_too_late_are_dropped(
    early: RunResult, updates: list[list[float]]
) -> None:
    for record, weights in zip(early.records, updates, strict=True):
        stale = [(pull.report.examples, record.round - pull.round) for pull in record.pulls]
        assert weights == pytest.approx([count * (1 + s) ** -0.5 for count, s in stale if s <= 1])
    assert sum(map(len, updates)) < sum(len(record.pulls) for record in early.records)


def test_rounds_are_shorter_and_every_download_is_counted(
    early: RunResult, keys: dict[str, Any], tmp_path: Path
) -> None:
    full = simulate(out=tmp_path / "full", **{**keys, **EARLY, "close_at": 1.0})
    assert early.summary["virtual_seconds"] < 0.8 * full.summary["virtual_seconds"]
    assert full.summary["late_replies"] == 0
    downloads = [record.downloaded_bytes for record in early.records]
    arrived = [sum(pull.report.download_bytes for pull in record.pulls) for record in early.records]
    assert sum(downloads) > sum(arrived)


@pytest.mark.parametrize("round", [1, 4, 7])
def test_a_run_continues_to_the_same_bits(early: RunResult, tmp_path: Path, round: int) -> None:
    directory = tmp_path / "run"
    shutil.copytree(early.directory.parent / "album" / str(round), directory)
    simulate(resume=directory)
    assert_same_end(directory, early.directory)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trained_factors": "alternate", "aggregation": "coordinate"}, "trained_factors = 'alternate'"),
        ({"aggregation": "het"}, "aggregation = 'het'"),
    ],
)
def test_what_cannot_take_late_replies_is_refused(values: dict[str, Any], words: str) -> None:
    """A late factor is the wrong one for its round; a norm has no examples to discount."""
    with pytest.raises(ConfigError, match=rf"^{words}: with close_at = 0\.5 it must be .*; or leave close_at at 1\.0$"):
        RunConfig(close_at=0.5, **values)


@pytest.mark.parametrize("sampling", ["uniform", "speed"])
def test_the_scheduler_alone_closes_early_too(tmp_path: Path, sampling: str) -> None:
    keys = {**PLAIN, "sampling": sampling, "probe": "never"}
    runs = [
        fedspine.schedule(out=tmp_path / str(close_at), close_at=close_at, rounds=60, **keys) for close_at in (1.0, 0.7)
    ]
    whole, early = (run.summary for run in runs)
    assert early["virtual_seconds"] < 0.8 * whole["virtual_seconds"]
    assert early["mean_waiting_seconds"] < whole["mean_waiting_seconds"]
    assert early["progress"] < whole["progress"]
    assert early["progress_per_virtual_second"] > whole["progress_per_virtual_second"]


def test_a_deployment_does_not_close_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"close_at = 0\.5: a deployment waits for all replies so far"):
        run_server(RunConfig(close_at=0.5), None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
