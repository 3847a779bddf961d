"""The figures of a run, the collapse warning, the plot, and what a terminal shows."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedspine.config import RunConfig
from fedspine.report.console import ConsoleObserver, clock, size
from fedspine.report.curves import draw_curves
from fedspine.report.observer import RunPlan
from fedspine.report.records import record_from_line, record_to_line, write_atomically
from fedspine.report.summary import collapse_warning, time_to_target
from fedspine.types import TRAINED, Action, Probe, Pull, Report, RoundRecord

TYPES = ("slow", "fast", "slow")


def record(round: int, accuracy: float | None, share: float | None = None) -> RoundRecord:
    report = Report(TRAINED, 10, compute_seconds=1.0, upload_bytes=7, loss_after=1 / 3)
    pulls = tuple(
        Pull(round, device, Action(0.1, 8), 0.0, 0.1, report, 1e9, Probe(1e-9, 1e-6, 0.1, 5) if device else None)
        for device in range(3)
    )
    return RoundRecord(round, 0.1, pulls, 10.0, 10.0 * round, 1.0, 21, 21, accuracy, accuracy, accuracy, share)


def test_time_to_target_lies_on_the_line_between_two_evaluations() -> None:
    records = [record(1, 0.5), record(2, None), record(3, 0.7), record(4, 0.65)]
    assert time_to_target(records, 0.6) == pytest.approx(20.0)
    assert time_to_target(records, 0.7) == pytest.approx(30.0)
    assert time_to_target(records, 0.45) == 10.0
    assert time_to_target(records, 0.8) is None
    assert time_to_target(records, 0.0) is None


def test_a_collapse_is_said_after_two_evaluations_in_one_class() -> None:
    records = [record(1, 0.5, 0.6), record(2, None, None), record(3, 0.5, 0.99), record(4, 0.5, 0.97)]
    assert collapse_warning(records[:3], 0.5) is None
    said = collapse_warning(records, 0.5)
    assert said is not None
    assert "97%" in said
    assert "dirichlet_alpha" in said
    assert collapse_warning(records, 0.96) is None  # one class is that common


def test_records_come_back_exactly() -> None:
    one = replace(record(3, 1 / 3, 0.5), wall={"seconds": 1.25})
    assert record_from_line(record_to_line(one)) == one


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_curves_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    records = [record(1, 0.5), record(2, None), record(3, 0.6)]
    draw_curves(records, RunConfig(devices=3, sampled=3, rounds=3, target_accuracy=0.55), TYPES, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_a_terminal_is_told_plan_progress_and_warnings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    console = ConsoleObserver()
    config = RunConfig(devices=3, sampled=3, rounds=2)
    console.plan(RunPlan(config, TYPES, 10, 20, 40, 1000, 2_500_000, 3 * 10**9, 75.0, "inline", 1, tmp_path))
    console.round_started(1, [0, 1, 2])
    console.device_done(1, 0, TRAINED)
    console.device_done(1, 1, "out_of_memory")
    console.round_done(record(1, 0.5))
    console.warning("[careful] it collapsed")
    console.warning("[careful] it collapsed")
    shown = capsys.readouterr().err
    for text in ("3 (1 fast, 2 slow)", "1m 15s", "2.5 MB", "3.00 GB", "device 1 ran out of memory", "accuracy 0.500"):
        assert text in shown
    assert shown.count("[careful] it collapsed") == 1


def test_durations_and_sizes_read_well() -> None:
    assert [clock(seconds) for seconds in (1.26, 75, 7500)] == ["1.3 s", "1m 15s", "2h 05m"]
    assert [size(count) for count in (12, 1500, 2_500_000, 3e9)] == ["12 B", "1.5 kB", "2.5 MB", "3.00 GB"]
