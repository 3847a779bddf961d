"""What a device catalogue holds: types of devices, their links, and how their conditions change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fedspine.devices.traces import Availability, LinkTraces
from fedspine.perturbation import UNPERTURBED, Perturbation

USABLE = 0.6
"""Of a device's memory, by a training process (guess)."""


@dataclass(frozen=True)
class DeviceType:
    """Devices of one kind. What is None is as the population says."""

    name: str
    count: int
    gflops: float
    modes: tuple[float, ...]
    memory_mb: float
    iteration_ms: float
    download_mbps: float | None = None
    upload_mbps: float | None = None
    jitter: float | None = None
    bandwidth_sigma: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Population:
    """All devices of a federation, and how their conditions change."""

    types: tuple[DeviceType, ...]
    download_mbps: tuple[float, ...]
    """By distance group; empty where every type has a link of its own."""
    upload_mbps: tuple[float, ...]
    bandwidth_sigma: float = 0.3
    mode_rounds: int = 20
    jitter: float = 0.05
    latency_ms: float = 20.0
    perturbation: Perturbation = UNPERTURBED
    rounds: int = 0
    """Of the run; 0: no run."""
    shuffled: bool = True
    """Whether types are dealt in an order drawn by seed; otherwise devices are numbered in the order of the types."""
    drawn: bool = False
    """Whether the types are single devices of a table, of which a run's are drawn by seed."""
    traces: LinkTraces | None = None
    """Of bandwidth, in place of mean and noise."""
    availability: Availability | None = None
    """When devices can take part; None: always."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once: what is cached by population is asked for all the time, and there may be thousands of types."""
        return hash((self.types, self.download_mbps, self.upload_mbps, self.perturbation, self.rounds))

    @property
    def devices(self) -> int:
        return sum(kind.count for kind in self.types)
