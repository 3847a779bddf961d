"""Who takes part in a round: a uniform draw, or devices of like speed (`sampling = "speed"`).

A synchronous round lasts as long as its slowest device, so the others wait least where all are about equally fast, as
in the tiers of TiFL (arXiv 2001.09249). Here there are no tiers and no profiling beforehand: a device that has taken
part least often is drawn, and joined by those whose predicted time is nearest to its own. The prediction is the time
model's, from past pulls or a roll call; devices without one keep to themselves, so that with none known the draw is
uniform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.controller.schedule import NOBODY, floor_ratio, quorum, sample_devices
from fedspine.controller.time_model import learn_rates
from fedspine.cost import Workload
from fedspine.errors import FederationError
from fedspine.randomness import Purpose, generator
from fedspine.types import Probe, Pull

SLACK = 1
"""Participations beyond the fewest with which a device may still be chosen for its speed."""
UNLIKE, TIER, TIE = 1e3, 1e4, 1e-9
"""Above every difference of two log times: a device with a prediction beside one without; one more participation beyond
the slack. Below: what draws lots."""


@dataclass(frozen=True)
class Fleet:
    """What past pulls tell of every device, as arrays."""

    asked: NDArray[np.int32]
    """Rounds that it was asked to take part in [devices]."""
    sparsity: NDArray[np.float64]
    """What it has cut [devices]."""
    log_rates: NDArray[np.float64]
    """Of seconds per FLOP and per byte [devices, 2]; NaN where nothing was measured yet."""

    @classmethod
    def of(cls, devices: int, pulls: Sequence[Pull]) -> Fleet:
        """From all pulls of a run with so many devices."""
        sparsity, log_rates = np.zeros(devices), np.full((devices, 2), np.nan)
        for pull in pulls:
            sparsity[pull.device] = pull.ratio_after
        for device, rates in learn_rates(pulls).items():
            log_rates[device] = np.log([rates.seconds_per_flop, rates.seconds_per_byte])
        asked = np.bincount([pull.device for pull in pulls], minlength=devices).astype(np.int32)
        return cls(asked, sparsity, log_rates)

    def with_roll_call(self, probes: Mapping[int, Probe]) -> Fleet:
        """Rates of a probe for the devices that have not trained yet."""
        if not probes:
            return self
        called = np.full_like(self.log_rates, np.nan)
        rates = [(probe.seconds_per_flop, probe.seconds_per_byte) for probe in probes.values()]
        called[list(probes)] = np.log(rates)
        return replace(self, log_rates=np.where(np.isnan(self.log_rates), called, self.log_rates))

    def log_seconds(self, floor: float, rank: int, workload: Workload) -> NDArray[np.float64]:
        """Log of the predicted time of a round at this rank, with no more cut than a sparsity floor demands [devices].

        NaN where nothing is known.
        """
        known = np.flatnonzero(~np.isnan(self.log_rates[:, 0]))
        ratios, rates = np.maximum(self.sparsity[known], floor), np.exp(self.log_rates[known])
        ranks = np.full(len(known), float(rank))
        flops, moved = workload.planned_flops(ratios, ranks), workload.planned_bytes(ratios, ranks)
        result = np.full(len(self.asked), np.nan)
        result[known] = np.log(rates[:, 0] * flops + rates[:, 1] * moved)
        return result


WAIT_SECONDS, LONGEST_WAIT_SECONDS = 60, 14 * 86_400
"""Between two looks at who can take part; the longest traces of availability repeat after two weeks."""


Absent: TypeAlias = Callable[[float], NDArray[np.intp]]
"""Devices that are away at a virtual time."""


def gather(config: RunConfig, clock_seconds: float, busy: set[int], absent: Absent) -> tuple[NDArray[np.intp], float]:
    """(devices that cannot be sampled, seconds that the server waits until as many as the quorum needs can).

    Errors: `FederationError` when there are never enough.
    """
    needed = min(quorum(config, config.sampled), config.devices - len(busy))
    for waited in range(0, LONGEST_WAIT_SECONDS, WAIT_SECONDS):
        away = absent(clock_seconds + waited)
        if busy:
            away = np.union1d(away, np.array(sorted(busy)))
        if config.devices - len(away) >= needed:
            return away, float(waited)
    raise FederationError(
        f"quorum = {config.quorum}: in two weeks there are never {needed} of {config.devices} devices that can take "
        "part; lower quorum or sampled, or take more devices or another file of availability"
    )


def choose_devices(
    config: RunConfig, round: int, workload: Workload, fleet: Callable[[], Fleet], busy: NDArray[np.intp] = NOBODY
) -> list[int]:
    """The round's devices, without replacement, in ascending order; none that is busy.

    `fleet` is asked only where it matters.
    """
    if config.sampling == "uniform":
        return sample_devices(config, round, busy)
    known = fleet()
    log_seconds = known.log_seconds(floor_ratio(config, round), config.fixed_rank, workload)
    rng = generator(config.seed, round, 0, Purpose.SAMPLE_DEVICES)
    return like_speed(known.asked, log_seconds, config.sampled, rng, busy)


def like_speed(
    asked: NDArray[np.int32],
    log_seconds: NDArray[np.float64],
    count: int,
    rng: np.random.Generator,
    busy: NDArray[np.intp] = NOBODY,
) -> list[int]:
    """`count` devices (or all that are free) around a drawn one of the fewest participations; ties are drawn too.

    Those with more than `SLACK` participations beyond the fewest come only after all others, so that over a run no two
    devices that were never busy differ by more than `SLACK` + 1.
    """
    if len(busy):
        asked = asked.copy()
        asked[busy] = np.iinfo(asked.dtype).max
        count = min(count, len(asked) - len(busy))
    fewest = int(asked.min())
    first = rng.choice(np.flatnonzero(asked == fewest))
    unknown = np.isnan(log_seconds)
    away = np.where(unknown, 0.0 if unknown[first] else UNLIKE, UNLIKE)
    if not unknown[first]:
        np.copyto(away, np.abs(log_seconds - log_seconds[first]), where=~unknown)
    distance = away + TIER * np.maximum(asked - (fewest + SLACK), 0) + TIE * rng.random(len(away))
    distance[first] = -1.0
    return sorted(np.argpartition(distance, count - 1)[:count].tolist())
