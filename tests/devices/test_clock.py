"""The virtual clock: conditions by seed, device and round, and the seconds that follow from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fedspine.devices.clock import DeviceState, VirtualMeter, device_state
from fedspine.devices.population import POPULATIONS, load_population

POPULATION = load_population("jetson-80", 80)
QUIET = replace(POPULATION, jitter=0.0, bandwidth_sigma=0.0)
STATE = DeviceState(
    type_name="Hand made",
    flops_per_second=2e9,
    iteration_seconds=0.01,
    download_bytes_per_second=1e6,
    upload_bytes_per_second=5e5,
    latency_seconds=0.02,
    memory_bytes=1000.0,
    jitter=1.5,
)


def test_pure_in_seed_device_and_round() -> None:
    """Whatever was asked before, and in whatever order."""
    asked = [(seed, device, round) for seed in (0, 1) for device in (0, 7, 79) for round in (1, 2, 21)]
    states = {key: device_state(POPULATION, *key) for key in asked}
    for key in reversed(asked):
        assert device_state(POPULATION, *key) == states[key]
    assert len(set(states.values())) == len(asked)


def test_power_modes_last_twenty_rounds() -> None:
    changed = 0
    for device in range(20):
        speeds = [device_state(POPULATION, 3, device, round).flops_per_second for round in range(1, 61)]
        assert len(set(speeds[:20])) == len(set(speeds[20:40])) == len(set(speeds[40:])) == 1
        changed += len({speeds[0], speeds[20], speeds[40]}) > 1
    assert changed > 10


def test_speeds_are_those_of_the_type_and_its_modes() -> None:
    kinds = {kind.name: kind for kind in POPULATION.types}
    for device in range(80):
        state = device_state(POPULATION, 0, device, 1)
        kind = kinds[state.type_name]
        assert state.flops_per_second in [kind.gflops * 1e9 * mode for mode in kind.modes]
        assert state.iteration_seconds == kind.iteration_ms / 1e3
        assert state.memory_bytes == kind.memory_mb * 1e6
        assert state.latency_seconds == 0.02


def test_bandwidth_and_jitter_differ_from_round_to_round() -> None:
    states = [device_state(POPULATION, 0, 5, round) for round in range(1, 21)]
    assert len({state.download_bytes_per_second for state in states}) == 20
    assert len({state.upload_bytes_per_second for state in states}) == 20
    assert len({state.jitter for state in states}) == 20


def test_noise_has_the_sigma_of_the_catalogue() -> None:
    states = [device_state(POPULATION, 0, device, round) for device in range(20) for round in range(1, 41)]
    quiet = [device_state(QUIET, 0, device, 1) for device in range(20) for _ in range(40)]
    assert np.std(np.log([state.jitter for state in states])) == pytest.approx(0.05, rel=0.1)
    for name in ("download_bytes_per_second", "upload_bytes_per_second"):
        logs = np.log([getattr(a, name) / getattr(b, name) for a, b in zip(states, quiet, strict=True)])
        assert np.std(logs) == pytest.approx(0.3, rel=0.1)
        assert abs(np.mean(logs)) < 0.05


def test_devices_are_dealt_over_the_distance_groups() -> None:
    """A device keeps its group; download and upload are of the same one."""
    groups = Counter()
    for device in range(80):
        links = {
            (state.download_bytes_per_second, state.upload_bytes_per_second)
            for state in (device_state(QUIET, 0, device, round) for round in (1, 2, 30))
        }
        assert len(links) == 1
        groups.update(links)
    expected = zip(QUIET.download_mbps, QUIET.upload_mbps, strict=True)
    assert set(groups) == {(down * 1e6 / 8, up * 1e6 / 8) for down, up in expected}
    assert min(groups.values()) >= 10


def test_without_noise_only_the_mode_changes() -> None:
    assert device_state(QUIET, 0, 5, 1) == device_state(QUIET, 0, 5, 20)
    assert device_state(QUIET, 0, 5, 1).jitter == 1.0


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 50, 80, 333])
@pytest.mark.parametrize("name", POPULATIONS)
def test_counts_of_types_scale(name: str, devices: int) -> None:
    population = load_population(name, devices)
    seen = Counter(device_state(population, 0, device, 1).type_name for device in range(devices))
    assert sum(seen.values()) == devices
    for kind in POPULATIONS[name].types:
        assert abs(seen[kind.name] - kind.count * devices / 80) < 1


def test_a_seed_deals_the_types_anew() -> None:
    first, second = ([device_state(POPULATION, seed, d, 1).type_name for d in range(80)] for seed in (0, 1))
    assert first != second
    assert Counter(first) == Counter(second) == {"Jetson TX2": 30, "Xavier NX": 40, "AGX Xavier": 10}


def test_seconds_by_hand() -> None:
    meter = VirtualMeter(STATE)
    assert meter.compute_seconds(4e9, 10) == pytest.approx((2.0 + 0.1) * 1.5)
    assert meter.download_seconds(3e6) == pytest.approx(3.02)
    assert meter.upload_seconds(1e6) == pytest.approx(2.02)
    assert meter.download_seconds(0) == meter.upload_seconds(0) == 0.02


def test_twice_the_bandwidth_halves_the_transfer() -> None:
    near = replace(STATE, download_bytes_per_second=2e6, upload_bytes_per_second=1e6, latency_seconds=0.0)
    far = replace(STATE, latency_seconds=0.0)
    assert VirtualMeter(far).download_seconds(7e5) == pytest.approx(2 * VirtualMeter(near).download_seconds(7e5))
    assert VirtualMeter(far).upload_seconds(7e5) == pytest.approx(2 * VirtualMeter(near).upload_seconds(7e5))


def test_out_of_memory_is_above_what_there_is() -> None:
    meter = VirtualMeter(STATE)
    assert not meter.out_of_memory(999)
    assert not meter.out_of_memory(1000)
    assert meter.out_of_memory(1001)
