"""Where the wall time went: every second of every worker is counted once."""

from dataclasses import replace

import pytest

from fedspine.report.profile import profile, shares
from fedspine.stopwatch import Stopwatch
from fedspine.types import TRAINED, Action, Pull, Report, RoundRecord


def record(**wall: float) -> RoundRecord:
    report = Report(TRAINED, wall={"seconds": 4.0, "forward": 1.5, "backward": 2.0, "probe batch": 0.25})
    pulls = tuple(Pull(1, device, Action(0.0, 8), 0.0, 0.0, report, 1.0) for device in range(3))
    return RoundRecord(1, 0.0, pulls, 1.0, 1.0, 0.0, 0, 0, wall=wall)


def test_parts_sum_to_the_time_of_all_workers() -> None:
    rounds = [record(seconds=9.0, plan=0.5, exchange=7.0, aggregate=0.25, evaluate=1.0)] * 2
    parts = profile(rounds, workers=2)
    assert sum(parts.values()) == pytest.approx(2 * 2 * 9.0)
    assert parts["forward"] == 9.0
    assert parts["probe batch"] == 1.5
    assert parts["other local work"] == pytest.approx(6 * 0.25)
    assert parts["wire and engine"] == pytest.approx(2 * 14.0 - 24.0)
    assert parts["evaluate"] == 4.0
    assert sum(shares(parts).values()) == pytest.approx(1.0)


def test_a_device_that_did_no_work_counts_nothing() -> None:
    one = record(seconds=9.0, exchange=9.0)
    lost = replace(one, pulls=tuple(replace(pull, report=Report("out_of_memory")) for pull in one.pulls))
    assert profile([lost], workers=1)["wire and engine"] == 9.0


def test_the_stopwatch_adds_up_and_counts_the_making_of_items() -> None:
    watch = Stopwatch()
    for _ in watch.drawing("data", [1, 2, 3]):
        with watch.part("work"):
            pass
    seconds = watch.seconds()
    assert set(seconds) == {"seconds", "data", "work"}
    assert seconds["data"] + seconds["work"] <= seconds["seconds"]
