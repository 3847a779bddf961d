"""The device catalogue: types with power modes, and the links between devices and server.

Built-in: 30 Jetson TX2, 40 Xavier NX, 10 AGX Xavier, the paper's testbed. Peaks and mode clocks follow NVIDIA's
figures; a quarter of the peak is taken as reached in training. Files of FedScale and AI-Benchmark are known too
(`imported.py`). In a catalogue of one's own, a type may also have its own jitter, bandwidth_sigma, latency_ms, and
download_mbps and upload_mbps as single numbers. It is a TOML file:

    mode_rounds = 20                 # rounds between two redraws of the power modes
    jitter = 0.05                    # sigma of the lognormal noise on compute time
    bandwidth_sigma = 0.3            # sigma of the lognormal noise on bandwidth, per round
    download_mbps = [28, 18, 10, 4]  # mean by distance group; devices are dealt over the groups
    upload_mbps = [14, 9, 5, 2]
    shuffled = true                  # types dealt to devices in an order drawn by seed; false: as they stand here

    [[types]]
    name = "Jetson TX2"
    count = 30                       # scaled when the run has another number of devices
    gflops = 330                     # reached in training at the best mode
    modes = [1.0, 0.86, 0.65]        # relative speed of the power modes
    memory_mb = 8000                 # that a training process may use
    iteration_ms = 4                 # fixed cost of one local iteration
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedspine.config import RunConfig
from fedspine.devices.imported import read_source
from fedspine.devices.profiles import USABLE, DeviceType, Population
from fedspine.devices.traces import Availability, LinkTraces
from fedspine.errors import PopulationError
from fedspine.perturbation import parse_perturbation

_DRAW = 110
"""What a draw is for, beside those of the clock and the traces."""

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


DEVICES: dict[str, Population] = {
    **{f"ram-{gb}g": _alone(f"device of {gb} GB", 30.0, 1000 * gb * USABLE) for gb in (4, 6, 8, 10, 12, 16)},
    "nova9pro": _alone("Hi nova 9 Pro", 3.2, 8050 * USABLE),
    "jetson-nano-4g": _alone("Jetson Nano", 45.0, 4000 * USABLE),
}
"""Single types. The tiers of memory have a guessed speed. The speed of the other two is counted back from the step
times that EdgeFlowerTune (arXiv 2605.08636) publishes for Gemma-270M at batch 8 and 64 tokens: 172 s and 12.5 s."""


def load_population(name: str, devices: int, seed: int = 0) -> Population:
    """A catalogue for a number of devices: its counts are scaled (largest remainder), or, of a table of devices
    (`imported.py`), as many are drawn by seed.

    `name`: a built-in catalogue or a file; after a comma come files of bandwidth traces or availability.
    Errors: `PopulationError` names the field, the value and the bound.
    """
    population = _found(name)
    if population.drawn:
        return replace(population, types=_drawn(population.types, devices, seed))
    return replace(population, types=_scaled(population.types, devices))


def population_of(config: RunConfig) -> Population:
    """The devices of a run, with what goes wrong on them. Errors: `PopulationError`."""
    population = load_population(config.population, config.devices, config.seed)
    return replace(population, perturbation=parse_perturbation(config.perturbation), rounds=config.rounds)


def load_device(name: str) -> Population:
    """A catalogue that holds one type.

    Errors: `PopulationError` when it holds several, or cannot be read.
    """
    population = _found(name)
    if len(population.types) > 1:
        names = ", ".join(kind.name for kind in population.types)
        raise PopulationError(
            f"device = '{name}': it holds {len(population.types)} types ({names}), and one is needed: "
            f"{', '.join(DEVICES)}, or a TOML file with one [[types]] table"
        )
    return replace(population, types=_scaled(population.types, 1))


def _found(name: str) -> Population:
    """With the counts of the catalogue."""
    parts = name.split(",")
    sources = [_source(name)] if len(parts) == 1 else [_source(part.strip()) for part in parts]
    catalogues = [each for each in sources if isinstance(each, Population)]
    traces = [each for each in sources if isinstance(each, LinkTraces)]
    calendars = [each for each in sources if isinstance(each, Availability)]
    if len(catalogues) != 1 or len(traces) > 1 or len(calendars) > 1:
        raise PopulationError(
            f"population = '{name}': {len(catalogues)} say what devices compute, {len(traces)} hold bandwidth traces, "
            f"{len(calendars)} availability; give one catalogue and at most one of each other, such as "
            "jetson-80,traces.jsonl"
        )
    population = catalogues[0]
    return replace(population, traces=next(iter(traces), None), availability=next(iter(calendars), None))


def _source(name: str) -> Population | LinkTraces | Availability:
    found = POPULATIONS.get(name) or DEVICES.get(name) or read_source(name)
    if found is None:
        raise PopulationError(
            f"population = '{name}': neither a file nor one of the built-in catalogues {', '.join(POPULATIONS)} "
            f"and devices {', '.join(DEVICES)}"
        )
    return found


def _drawn(types: tuple[DeviceType, ...], devices: int, seed: int) -> tuple[DeviceType, ...]:
    """Those of the run, each as often as any other or once more."""
    counts = np.full(len(types), devices // len(types))
    counts[np.random.default_rng([seed, _DRAW]).permutation(len(types))[: devices % len(types)]] += 1
    return tuple(replace(kind, count=int(count)) for kind, count in zip(types, counts, strict=True) if count)


def _scaled(types: tuple[DeviceType, ...], devices: int) -> tuple[DeviceType, ...]:
    total = sum(kind.count for kind in types)
    exact = [kind.count * devices / total for kind in types]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(types)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: devices - sum(counts)]:
        counts[index] += 1
    return tuple(replace(kind, count=count) for kind, count in zip(types, counts, strict=True))
