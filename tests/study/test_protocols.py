"""Protocols against learning curves written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fedspine.study.protocols import (
    Budget,
    Change,
    Cost,
    Quality,
    cost_to_target,
    quality_under_budget,
    restricted_mean_seconds,
    robustness,
    slowed,
)


def trace(*values: float, seconds: float = 10.0) -> list[dict[str, Any]]:
    """A point every `seconds`; 1 kB more each time, 100 MB all the time."""
    return [
        {"value": value, "device_seconds": seconds * n, "upload_bytes": 400.0 * n, "download_bytes": 600.0 * n,
         "peak_memory_bytes": 1e8, "energy_joules": None}
        for n, value in enumerate(values, start=1)
    ]  # fmt: skip


def test_the_best_point_within_every_budget_counts() -> None:
    curve = trace(0.5, 0.8, 0.7)
    assert quality_under_budget(curve, Budget()) == Quality(0.8)
    assert quality_under_budget(curve, Budget(seconds=10)) == Quality(0.5)
    assert quality_under_budget(curve, Budget(seconds=100, bytes=1500)) == Quality(0.5)
    assert quality_under_budget(curve, Budget(seconds=9)) == Quality(None, "seconds")
    assert quality_under_budget(curve, Budget(memory_bytes=9e7)) == Quality(None, "memory_bytes")
    assert quality_under_budget(curve, Budget(energy_joules=1.0)) == Quality(None, "energy_joules")


def test_a_target_is_reached_for_good_or_not() -> None:
    curve = trace(0.5, 0.8, 0.7, 0.8, 0.9)
    assert cost_to_target(curve, 0.8) == Cost(20.0, 2000.0, False)
    assert cost_to_target(curve, 0.8, sustained=2) == Cost(40.0, 4000.0, False)
    assert cost_to_target(curve, 0.95) == Cost(50.0, 5000.0, True)


def test_runs_that_fail_are_not_left_out() -> None:
    reached, failed = Cost(10.0, 0.0, False), Cost(40.0, 0.0, True)
    assert restricted_mean_seconds([reached, Cost(30.0, 0.0, False)]) == (20.0, 30.0)
    assert restricted_mean_seconds([reached, failed]) == (25.0, 40.0)
    assert restricted_mean_seconds([Cost(80.0, 0.0, False), failed]) == (40.0, 40.0)


def test_a_slower_device_gets_less_far() -> None:
    curve = trace(0.4, 0.6, 0.8)
    assert slowed(curve, Budget(seconds=30), slowdown=2.0) == pytest.approx(0.4 / 0.8 - 1)
    assert slowed(curve, Budget(seconds=30), slowdown=4.0) == -1.0
    assert slowed(curve, Budget(seconds=30, memory_bytes=1.2e8), memory_share=0.5) == -1.0
    assert slowed(curve, Budget(seconds=5), slowdown=2.0) is None


def test_a_perturbed_run_is_held_against_its_twin() -> None:
    clean, slow = trace(0.4, 0.6, 0.8), trace(0.4, 0.6, 0.6, seconds=20.0)
    found = robustness(slow, clean)
    assert (found.value, found.seconds, found.bytes) == pytest.approx((-0.25, 1.0, 0.0))
    assert found.value_in_time == pytest.approx(-0.5)  # after 30 s it has its first point only
    assert robustness(trace(0.8, seconds=20.0), trace(0.8)).value_in_time is None
    assert robustness(clean, clean) == Change(0.0, 0.0, 0.0, 0.0)
    assert robustness(trace(-3.0), trace(-2.0)).value == pytest.approx(-0.5)  # a larger error is worse
    assert robustness(clean, trace(0.0)).value is None
