"""Who takes part in a round, and when the sparsity rises: a floor for all, and how far ahead of it one may prune."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.errors import FederationError
from fedspine.randomness import Purpose, generator
from fedspine.types import TRAINED, Report

NOBODY: NDArray[np.intp] = np.empty(0, dtype=np.intp)


def sample_devices(config: RunConfig, round: int, busy: NDArray[np.intp] = NOBODY) -> list[int]:
    """The round's devices, without replacement, in ascending order; all that are free, where those are fewer."""
    rng = generator(config.seed, round, 0, Purpose.SAMPLE_DEVICES)
    if len(busy):
        free = np.delete(np.arange(config.devices), busy)
        return sorted(rng.choice(free, min(config.sampled, len(free)), replace=False).tolist())
    return sorted(int(device) for device in rng.choice(config.devices, config.sampled, replace=False))


def check_quorum(config: RunConfig, number: int, asked: int, reports: Sequence[Report]) -> None:
    """Errors: `FederationError` when too few of the `asked` devices trained in round `number`."""
    lost = [report for report in reports if report.outcome != TRAINED]
    trained, needed = len(reports) - len(lost), quorum(config, asked)
    if trained >= needed:
        return
    first = f"the first said: {lost[0].outcome}: {lost[0].message}" if lost else "the others did not reply"
    raise FederationError(
        f"round {number}: {trained} of {asked} devices finished, quorum = {config.quorum} needs {needed}; {first}"
    )


def quorum(config: RunConfig, asked: int) -> int:
    """Devices that must train for a round to count."""
    return max(1, round(config.quorum * asked))


def floor_ratio(config: RunConfig, round: int) -> float:
    """Share of prunable parameters that every device of the round has to have cut (`round` counts from 1)."""
    return config.target_sparsity * ramp(config, round)


def ramp(config: RunConfig, round: int) -> float:
    """How far along its way to the target a round is, 0 to 1 (`round` counts from 1).

    Cubic (LoRAPrune, arXiv 2305.18403; APT, arXiv 2401.12200) from 0 after the warm-up to 1 at `ramp_ratio` of the
    rounds; `one-shot` jumps to 1 after the warm-up.
    """
    begin = warmup_rounds(config)
    end = max(begin + 1, round_up(config.ramp_ratio * config.rounds))
    if round <= begin:
        return 0.0
    if config.schedule == "one-shot" or round >= end:
        return 1.0
    left = 1.0 - (round - begin) / (end - begin)
    return 1.0 - left**3


def allowed_range(config: RunConfig, round: int, current: float) -> tuple[float, float]:
    """(smallest, largest) ratio that a device with `current` may be given in a round.

    A ratio is a sparsity to reach, monotone per device and capped at the target; nobody may be pruned more than
    `max_step_ratio` in one round unless the floor demands it, so that one exploratory draw cannot jump to the target.
    """
    if round <= warmup_rounds(config):
        return current, current
    lowest = max(current, floor_ratio(config, round))
    return lowest, max(lowest, min(config.target_sparsity, current + config.max_step_ratio))


def warmup_rounds(config: RunConfig) -> int:
    """Rounds before the first cut: at least one, because importance has to be measured first."""
    return max(1, int(config.warmup_ratio * config.rounds))


def round_up(value: float) -> int:
    return int(-(-value // 1))
