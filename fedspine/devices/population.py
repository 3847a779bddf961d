"""The device catalogue: types with power modes, and the links between devices and server.

Built-in: 30 Jetson TX2, 40 Xavier NX, 10 AGX Xavier, the paper's testbed. Peaks and mode clocks follow NVIDIA's
figures; a quarter of the peak is taken as reached in training. A catalogue of one's own is a TOML file:

    mode_rounds = 20                 # rounds between two redraws of the power modes
    jitter = 0.05                    # sigma of the lognormal noise on compute time
    bandwidth_sigma = 0.3            # sigma of the lognormal noise on bandwidth, per round
    download_mbps = [28, 18, 10, 4]  # mean by distance group; devices are dealt over the groups
    upload_mbps = [14, 9, 5, 2]

    [[types]]
    name = "Jetson TX2"
    count = 30                       # scaled when the run has another number of devices
    gflops = 330                     # reached in training at the best mode
    modes = [1.0, 0.86, 0.65]        # relative speed of the power modes
    memory_mb = 8000                 # that a training process may use
    iteration_ms = 4                 # fixed cost of one local iteration
"""

from __future__ import annotations

import math
import os
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedspine.config import RunConfig
from fedspine.errors import PopulationError
from fedspine.perturbation import UNPERTURBED, Perturbation, parse_perturbation


@dataclass(frozen=True)
class DeviceType:
    """Devices of one kind."""

    name: str
    count: int
    gflops: float
    modes: tuple[float, ...]
    memory_mb: float
    iteration_ms: float


@dataclass(frozen=True)
class Population:
    """All devices of a federation, and how their conditions change."""

    types: tuple[DeviceType, ...]
    download_mbps: tuple[float, ...]
    upload_mbps: tuple[float, ...]
    bandwidth_sigma: float = 0.3
    mode_rounds: int = 20
    jitter: float = 0.05
    latency_ms: float = 20.0
    perturbation: Perturbation = UNPERTURBED
    rounds: int = 0
    """Of the run; 0: no run."""

    @property
    def devices(self) -> int:
        return sum(kind.count for kind in self.types)


_JETSONS = (
    DeviceType("Jetson TX2", 30, 330.0, (1.0, 0.86, 0.86, 0.65), 6_000, 4.0),
    DeviceType("Xavier NX", 40, 1500.0, (1.0, 0.91, 0.73, 0.73, 0.55, 0.46, 0.36, 0.29), 6_000, 3.0),
    DeviceType("AGX Xavier", 10, 2750.0, (1.0, 0.65, 0.65, 0.65, 0.65, 0.49, 0.38, 0.65), 24_000, 3.0),
)

POPULATIONS: dict[str, Population] = {
    "jetson-80": Population(_JETSONS, (28.0, 18.0, 10.0, 4.0), (14.0, 9.0, 5.0, 2.0)),
    "jetson-80-compute-bound": Population(
        tuple(replace(kind, gflops=kind.gflops / 8) for kind in _JETSONS),
        (900.0, 600.0, 300.0, 150.0),
        (450.0, 300.0, 150.0, 75.0),
    ),
    "jetson-80-communication-bound": Population(_JETSONS, (7.0, 4.5, 2.5, 1.0), (3.5, 2.25, 1.25, 0.5)),
}
"""Built-in catalogues: the default; one on a wired network with 3 % of the peak reached; one with a slow network."""


def _alone(name: str, gflops: float, memory_mb: float) -> Population:
    """One type in steady conditions, on Wi-Fi or a good mobile link."""
    kind = DeviceType(name, 1, gflops, (1.0,), memory_mb, 4.0)
    return Population((kind,), (20.0,), (10.0,), bandwidth_sigma=0.0, jitter=0.0)


USABLE = 0.6
"""Of a device's memory, by a training process (guess)."""
DEVICES: dict[str, Population] = {
    **{f"ram-{gb}g": _alone(f"device of {gb} GB", 30.0, 1000 * gb * USABLE) for gb in (4, 6, 8, 10, 12, 16)},
    "nova9pro": _alone("Hi nova 9 Pro", 3.2, 8050 * USABLE),
    "jetson-nano-4g": _alone("Jetson Nano", 45.0, 4000 * USABLE),
}
"""Single types. The tiers of memory have a guessed speed. The speed of the other two is counted back from the step
times that EdgeFlowerTune (arXiv 2605.08636) publishes for Gemma-270M at batch 8 and 64 tokens: 172 s and 12.5 s."""


def load_population(name: str, devices: int) -> Population:
    """A built-in catalogue or a TOML file, its counts scaled to the number of devices (largest remainder).

    Errors: `PopulationError` names the field, the value and the bound.
    """
    population = POPULATIONS.get(name) or DEVICES.get(name) or _read(name)
    return replace(population, types=_scaled(population.types, devices))


def population_of(config: RunConfig) -> Population:
    """The devices of a run, with what goes wrong on them. Errors: `PopulationError`."""
    population = load_population(config.population, config.devices)
    return replace(population, perturbation=parse_perturbation(config.perturbation), rounds=config.rounds)


def load_device(name: str) -> Population:
    """A catalogue that holds one type.

    Errors: `PopulationError` when it holds several, or cannot be read.
    """
    population = load_population(name, 1)
    if len(population.types) > 1:
        names = ", ".join(kind.name for kind in population.types)
        raise PopulationError(
            f"device = '{name}': it holds {len(population.types)} types ({names}), and one is needed: "
            f"{', '.join(DEVICES)}, or a TOML file with one [[types]] table"
        )
    return population


def _scaled(types: tuple[DeviceType, ...], devices: int) -> tuple[DeviceType, ...]:
    total = sum(kind.count for kind in types)
    exact = [kind.count * devices / total for kind in types]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(types)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: devices - sum(counts)]:
        counts[index] += 1
    return tuple(replace(kind, count=count) for kind, count in zip(types, counts, strict=True))


def _read(name: str) -> Population:
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        raise PopulationError(
            f"population = '{name}': neither a file nor one of the built-in catalogues {', '.join(POPULATIONS)} "
            f"and devices {', '.join(DEVICES)}"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PopulationError(f"population = '{name}': not valid TOML: {error}") from None
    kinds = values.pop("types", [])
    if not isinstance(kinds, list) or not kinds:
        raise PopulationError(f"population = '{name}': needs at least one [[types]] table")
    types = tuple(_device_type(f"population '{name}', types[{i}]", kind) for i, kind in enumerate(kinds))
    where = f"population '{name}'"
    _known(where, values, set(Population.__dataclass_fields__) - {"types", "perturbation", "rounds"})
    down = _numbers(where, values, "download_mbps")
    up = _numbers(where, values, "upload_mbps")
    if len(down) != len(up):
        raise PopulationError(f"{where}: download_mbps has {len(down)} groups, upload_mbps {len(up)}; make them equal")
    return Population(
        types,
        down,
        up,
        bandwidth_sigma=_number(where, values, "bandwidth_sigma", 0.3, zero=True),
        mode_rounds=_whole(where, values, "mode_rounds", 20),
        jitter=_number(where, values, "jitter", 0.05, zero=True),
        latency_ms=_number(where, values, "latency_ms", 20.0, zero=True),
    )


def _device_type(where: str, values: Any) -> DeviceType:
    if not isinstance(values, dict):
        raise PopulationError(f"{where}: must be a table")
    _known(where, values, set(DeviceType.__dataclass_fields__))
    if not isinstance(values.get("name"), str):
        raise PopulationError(f"{where}: name is missing or no text")
    where = f"{where} ({values['name']})"
    return DeviceType(
        values["name"],
        _whole(where, values, "count"),
        _number(where, values, "gflops"),
        _numbers(where, values, "modes") if "modes" in values else (1.0,),
        _number(where, values, "memory_mb"),
        _number(where, values, "iteration_ms", 3.0, zero=True),
    )


def _known(where: str, values: dict[str, Any], names: set[str]) -> None:
    for key in values:
        if key not in names:
            raise PopulationError(f"{where}: unknown key '{key}'; it takes {', '.join(sorted(names))}")


def _number(where: str, values: dict[str, Any], key: str, default: float | None = None, zero: bool = False) -> float:
    value = values.get(key, default)
    if value is None:
        raise PopulationError(f"{where}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PopulationError(f"{where}: {key} = {value!r} must be a number")
    if not math.isfinite(value):
        raise PopulationError(f"{where}: {key} = {value} must be finite")
    if value < 0 or (value == 0 and not zero):
        raise PopulationError(f"{where}: {key} = {value} must be {'at least' if zero else 'above'} 0")
    return float(value)


def _whole(where: str, values: dict[str, Any], key: str, default: int | None = None) -> int:
    value = _number(where, values, key, default)
    if value != int(value):
        raise PopulationError(f"{where}: {key} = {value} must be a whole number")
    return int(value)


def _numbers(where: str, values: dict[str, Any], key: str) -> tuple[float, ...]:
    given = values.get(key)
    if not isinstance(given, list) or not given:
        raise PopulationError(f"{where}: {key} must be a list of numbers, such as [10, 4]")
    return tuple(_number(where, {key: value}, key) for value in given)
