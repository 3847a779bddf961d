"""Cohorts of like speed: who is chosen, how evenly, and what it does to the waiting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedspine
from fedspine.config import RunConfig
from fedspine.controller.cohort import SLACK, Fleet, choose_devices, like_speed
from fedspine.controller.history import History
from fedspine.controller.schedule import sample_devices
from fedspine.cost import workload_of
from fedspine.minilm_shape import minilm_shape
from fedspine.randomness import Purpose, generator
from fedspine.types import OUT_OF_MEMORY, TRAINED, Action, Probe, Pull, Report

CONFIG = RunConfig(sampling="speed")
WORKLOAD = workload_of(CONFIG, minilm_shape(CONFIG))


def pull(round: int, device: int, seconds: float = 1.0, outcome: str = TRAINED) -> Pull:
    report = Report(outcome, 9, 3 * seconds, seconds, seconds, download_bytes=10**6, upload_bytes=10**6)
    return Pull(round, device, Action(0.1 * round, 8), 0.1 * round - 0.1, 0.1 * round, report, 1e11)


def test_the_nearest_in_time_join_a_drawn_one() -> None:
    times = np.log([8.0, 1.0, 4.0, 1.1, 9.0, 1.3, 4.4, 4.2, 1.2])
    found = {tuple(like_speed(np.full(9, 3, np.int32), times, 3, np.random.default_rng(seed))) for seed in range(50)}
    assert {(1, 3, 8), (2, 6, 7), (0, 4, 6)} <= found
    assert all(len(set(devices)) == 3 for devices in found)
    only = like_speed(np.array([3, 3, 4, 3, 2, 3, 3, 3, 3], np.int32), times, 3, np.random.default_rng(0))
    assert only == [0, 4, 6]  # device 4 has taken part least


def test_what_is_unknown_keeps_to_itself() -> None:
    times = np.array([1.0, np.nan, 1.1, np.nan, np.nan, 1.2])
    counts = np.array([1, 0, 1, 0, 0, 1], np.int32)
    assert like_speed(counts, times, 3, np.random.default_rng(0)) == [1, 3, 4]
    assert like_speed(1 - counts, times, 3, np.random.default_rng(0)) == [0, 2, 5]
    assert set(like_speed(counts, times, 4, np.random.default_rng(0))) > {1, 3, 4}


@pytest.mark.parametrize(("devices", "count"), [(80, 10), (37, 5), (12, 11), (5, 5)])
def test_nobody_takes_part_much_more_often_than_another(devices: int, count: int) -> None:
    """At any moment of a run, whatever the devices' times, some of which never become known."""
    rng = np.random.default_rng(devices)
    asked = np.zeros(devices, np.int32)
    log_seconds = np.full(devices, np.nan)
    for round in range(1, 200):
        chosen = like_speed(asked, log_seconds, count, np.random.default_rng([devices, round]))
        assert chosen == sorted(set(chosen))
        assert len(chosen) == count
        asked[chosen] += 1
        log_seconds[[device for device in chosen if device % 7]] = 0.0
        log_seconds += rng.normal(np.arange(devices) / devices, 0.1)
        assert asked.max() - asked.min() <= SLACK + 1


def test_every_device_is_met_before_any_is_met_again() -> None:
    pulls: list[Pull] = []
    for round in range(1, 9):
        fleet = Fleet.of(80, pulls)
        chosen = choose_devices(CONFIG, round, WORKLOAD, lambda fleet=fleet: fleet)  # type: ignore[misc]
        pulls += [replace(pull(round, device, 1.0 + device), ratio_after=0.1) for device in chosen]
    assert sorted(each.device for each in pulls) == list(range(80))
    chosen = choose_devices(CONFIG, 9, WORKLOAD, lambda: Fleet.of(80, pulls))
    assert max(chosen) - min(chosen) == 9  # the time of a device rises with its number
    assert chosen == choose_devices(CONFIG, 9, WORKLOAD, lambda: Fleet.of(80, pulls))


def test_uniform_is_the_draw_of_ever() -> None:
    config = RunConfig(sampling="uniform")
    expected = generator(0, 3, 0, Purpose.SAMPLE_DEVICES).choice(80, 10, replace=False)
    assert choose_devices(config, 3, WORKLOAD, lambda: pytest.fail("not asked")) == sorted(expected.tolist())
    assert sample_devices(config, 3) == sorted(expected.tolist())


def test_history_tells_of_the_fleet_what_the_pulls_tell() -> None:
    history, past = History(6, 20), []
    for round, devices in enumerate([(0, 3, 5), (3, 4), (0, 3), (5, 4)], start=1):
        pulls = [pull(round, d, round + d, OUT_OF_MEMORY if d == 4 and round == 2 else TRAINED) for d in devices]
        history.add(pulls)
        past += pulls
        ours, theirs = history.fleet(), Fleet.of(6, past)
        np.testing.assert_array_equal(ours.asked, theirs.asked)
        np.testing.assert_array_equal(ours.sparsity, theirs.sparsity)
        np.testing.assert_allclose(ours.log_rates, theirs.log_rates, rtol=1e-12)
        assert history.timed(range(6)) == (~np.isnan(ours.log_rates[:, 0])).tolist()
    assert ours.asked.tolist() == [2, 0, 0, 3, 2, 2]
    assert np.isnan(ours.log_rates[:, 0]).tolist() == [False, True, True, False, False, False]


def test_predicted_time_is_that_of_the_clock() -> None:
    fleet = Fleet.of(2, [pull(1, 1, 2.0)])
    seconds = np.exp(fleet.log_seconds(0.3, 8, WORKLOAD))
    assert np.isnan(seconds[0])
    expected = 6.0 / 1e11 * WORKLOAD.planned_flops(0.3, 8) + 4.0 / 2e6 * WORKLOAD.planned_bytes(0.3, 8)
    assert seconds[1] == pytest.approx(expected)


def test_a_roll_call_counts_until_a_device_has_trained() -> None:
    fleet = Fleet.of(3, [pull(1, 1)]).with_roll_call({device: Probe(1e-9, 1e-6, 0.1, 8) for device in range(2)})
    assert np.exp(fleet.log_rates[0]) == pytest.approx([1e-9, 1e-6])
    assert np.array_equal(fleet.log_rates[1], Fleet.of(3, [pull(1, 1)]).log_rates[1])
    assert np.isnan(fleet.log_rates[2]).all()


def test_a_roll_call_shortens_the_first_rounds(tmp_path: Path) -> None:
    """By more than it costs: without it every device's first round is one of strangers."""
    learned, called = (
        fedspine.schedule(out=tmp_path / str(call), sampling="speed", roll_call=call, rounds=8, sampled=10).summary
        for call in (False, True)
    )
    assert called["virtual_seconds"] < 0.8 * learned["virtual_seconds"]


@pytest.mark.parametrize("policy", ["fixed", "fedspine"])
def test_devices_wait_less_and_the_run_ends_sooner(tmp_path: Path, policy: str) -> None:
    keys = {"policy": policy, "rounds": 64, "sampled": 10}
    uniform, speed = (
        fedspine.schedule(out=tmp_path / sampling, sampling=sampling, **keys).summary
        for sampling in ("uniform", "speed")
    )
    assert speed["mean_waiting_seconds"] < 0.7 * uniform["mean_waiting_seconds"]
    assert speed["virtual_seconds"] < 0.85 * uniform["virtual_seconds"]


def test_a_large_fleet(tmp_path: Path) -> None:
    run = fedspine.schedule(out=tmp_path / "run", devices=200_000, sampled=100, rounds=4, sampling="speed")
    assert run.summary["devices_that_took_part"] == 400
