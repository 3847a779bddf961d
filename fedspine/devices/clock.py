"""The virtual clock: what a simulated device's local round takes, as a pure function of seed, device and round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedspine.devices.profiles import DeviceType, Population
from fedspine.types import FAILED, OUT_OF_MEMORY, Probe

MOST_NAMES = 6
"""Types that a figure can tell apart."""
PROBE_BYTES = 32_768
"""Payload of an in-round probe, each way."""
_TYPE, _MODE, _LINK, _JITTER, _SLOW, _AWAY = 101, 102, 103, 104, 105, 106


@dataclass(frozen=True)
class DeviceState:
    """A device's conditions in one round."""

    type_name: str
    flops_per_second: float
    iteration_seconds: float
    download_bytes_per_second: float
    upload_bytes_per_second: float
    latency_seconds: float
    memory_bytes: float
    jitter: float
    """Factor on compute time."""
    away: bool = False
    """It drops out of the round, after the download."""


def device_state(population: Population, seed: int, device: int, round: int) -> DeviceState:
    """Conditions of a device in a round: the power mode lasts `mode_rounds` rounds, links and jitter one."""
    kind = population.types[type_indices(population, seed)[device]]
    epoch = (round - 1) // population.mode_rounds
    mode = kind.modes[int(np.random.default_rng([seed, epoch, device, _MODE]).integers(len(kind.modes)))]
    down_mbps, up_mbps = _bandwidth(population, kind, seed, device, round)
    noise = np.random.default_rng([seed, round, device, _JITTER]).standard_normal()
    trouble = population.perturbation
    slow = trouble.kind == "slowdown" and _hit(population.devices, trouble.share, (seed, _SLOW))[device]
    away = trouble.kind == "dropout" and _hit(population.devices, trouble.share, (seed, round, _AWAY))[device]
    late = 0 < population.rounds < 2 * round
    return DeviceState(
        type_name=kind.name,
        flops_per_second=kind.gflops * 1e9 * mode,
        iteration_seconds=kind.iteration_ms / 1e3,
        download_bytes_per_second=down_mbps * trouble.of("link") * 1e6 / 8,
        upload_bytes_per_second=up_mbps * trouble.of("link") * 1e6 / 8,
        latency_seconds=_own(kind.latency_ms, population.latency_ms) / 1e3,
        memory_bytes=kind.memory_mb * (trouble.of("memory") if late else 1.0) * 1e6,
        jitter=float(np.exp(_own(kind.jitter, population.jitter) * noise)) * (trouble.factor if slow else 1.0),
        away=bool(away) and population.devices > 1,
    )


def _bandwidth(population: Population, kind: DeviceType, seed: int, device: int, round: int) -> tuple[float, float]:
    """(download, upload) in Mbit/s."""
    if population.traces:
        return population.traces.read(seed, device, round)
    noise = np.random.default_rng([seed, round, device, _LINK]).standard_normal(2)
    down, up = np.exp(_own(kind.bandwidth_sigma, population.bandwidth_sigma) * noise)
    if kind.download_mbps and kind.upload_mbps:
        return kind.download_mbps * down, kind.upload_mbps * up
    group = int(np.random.default_rng([seed, device, _LINK]).integers(len(population.download_mbps)))
    return population.download_mbps[group] * down, population.upload_mbps[group] * up


def _own(value: float | None, usual: float) -> float:
    return usual if value is None else value


class Meter(Protocol):
    """What a device's part in a round costs."""

    @property
    def memory_bytes(self) -> float:
        """That training may use."""

    def refusal(self, nbytes: float) -> tuple[str, str] | None:
        """(outcome, why) when the device does not train in the round; `nbytes`: memory that it would need."""

    def compute_seconds(self, flops: float, iterations: int) -> float: ...

    def download_seconds(self, nbytes: float) -> float: ...

    def upload_seconds(self, nbytes: float) -> float: ...

    def peak_memory_bytes(self, needed: float) -> int:
        """`needed`: by the cost formula."""


@dataclass(frozen=True)
class VirtualMeter:
    """Seconds that a device would have needed."""

    state: DeviceState

    @property
    def memory_bytes(self) -> float:
        return self.state.memory_bytes

    def compute_seconds(self, flops: float, iterations: int) -> float:
        busy = flops / self.state.flops_per_second + iterations * self.state.iteration_seconds
        return busy * self.state.jitter

    def download_seconds(self, nbytes: float) -> float:
        return self.state.latency_seconds + nbytes / self.state.download_bytes_per_second

    def upload_seconds(self, nbytes: float) -> float:
        return self.state.latency_seconds + nbytes / self.state.upload_bytes_per_second

    def out_of_memory(self, nbytes: float) -> bool:
        return nbytes > self.memory_bytes

    def peak_memory_bytes(self, needed: float) -> int:
        return int(needed)

    def refusal(self, nbytes: float) -> tuple[str, str] | None:
        if self.state.away:
            return FAILED, "dropped out of the round"
        return lack_of_memory(nbytes, self.memory_bytes)

    def probe(self, flops: float) -> Probe:
        """Time a local iteration, or a part of one, of `flops`, and a small transfer."""
        compute = self.compute_seconds(flops, 1)
        empty = self.download_seconds(0) + self.upload_seconds(0)
        transfer = self.download_seconds(PROBE_BYTES) + self.upload_seconds(PROBE_BYTES)
        return Probe(
            seconds_per_flop=compute / flops,
            seconds_per_byte=(transfer - empty) / (2 * PROBE_BYTES),
            seconds=compute + transfer,
            bytes=2 * PROBE_BYTES,
        )


def lack_of_memory(needed: float, memory_bytes: float) -> tuple[str, str] | None:
    """(outcome, why) where memory does not do."""
    if needed <= memory_bytes:
        return None
    return OUT_OF_MEMORY, f"needs {needed / 1e6:.0f} MB of {memory_bytes / 1e6:.0f} MB"


@lru_cache(maxsize=8)
def _hit(devices: int, share: float, key: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which devices a perturbation hits [devices]: that share of them, at least one, and all only with a share of 1."""
    most = devices if share == 1 else max(1, devices - 1)
    mask = np.zeros(devices, dtype=np.bool_)
    mask[np.random.default_rng(key).permutation(devices)[: min(most, max(1, round(share * devices)))]] = True
    return mask


@lru_cache(maxsize=8)
def type_indices(population: Population, seed: int) -> NDArray[np.unsignedinteger[Any]]:
    """Type of every device [devices]: the catalogue's counts in a seeded order, one byte each. Read-only."""
    smallest = np.min_scalar_type(len(population.types) - 1)
    indices = np.repeat(np.arange(len(population.types), dtype=smallest), [kind.count for kind in population.types])
    mixed = np.random.default_rng([seed, _TYPE]).permutation(indices) if population.shuffled else indices
    mixed.flags.writeable = False
    return mixed


@lru_cache(maxsize=2)
def _calendars(population: Population, seed: int) -> NDArray[np.unsignedinteger[Any]] | None:
    """Availability trace of every device [devices], where there are any."""
    return None if population.availability is None else population.availability.calendars(seed, population.devices)


def idle_bytes(population: Population, seed: int) -> int:
    """Of what is kept for every device of a run."""
    calendars = _calendars(population, seed)
    return type_indices(population, seed).nbytes + (0 if calendars is None else calendars.nbytes)


def absent(population: Population, seed: int, clock_seconds: float) -> NDArray[np.intp]:
    """Devices that cannot take part in a round that begins at a virtual time, ascending."""
    calendars = _calendars(population, seed)
    if calendars is None or population.availability is None:
        return np.empty(0, dtype=np.intp)
    return np.flatnonzero(~population.availability.present(seed, clock_seconds)[calendars])


def type_names(population: Population, seed: int) -> tuple[str, ...]:
    """What a report calls the type of every device: its name, or where there are too many, its third by speed."""
    speeds = [kind.gflops for kind in population.types]
    names = [kind.name for kind in population.types]
    if len(names) > MOST_NAMES:
        ranks = np.argsort(np.argsort(speeds, kind="stable"))
        names = [("slowest third", "middle third", "fastest third")[3 * rank // len(names)] for rank in ranks]
    return tuple(names[index] for index in type_indices(population, seed))
