"""What the server learns of a device's speed: two rates, from observed times only.

A device reports compute and transfer time apart, so one pull predicts the time of every (ratio, rank): seconds per
FLOP and seconds per byte, a moving average in the log domain. There is no prior knowledge of devices; one that was
never seen is taken to be somewhat slower than most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspine.types import TRAINED, Candidate, Pull

NEWEST_WEIGHT = 0.5
UNSEEN_QUANTILE = 0.6

LogRates = tuple[float, float]
"""Natural logarithms of seconds per FLOP and seconds per byte."""


@dataclass(frozen=True)
class Rates:
    """Of one device."""

    seconds_per_flop: float
    seconds_per_byte: float


def learn_rates(pulls: Sequence[Pull]) -> dict[int, Rates]:
    """Rates of every device that has trained."""
    logs: dict[int, LogRates] = {}
    for pull in pulls:
        now = log_rates(logs.get(pull.device), pull)
        if now is not None:
            logs[pull.device] = now
    return {device: Rates(math.exp(a), math.exp(b)) for device, (a, b) in logs.items()}


def log_rates(past: LogRates | None, pull: Pull) -> LogRates | None:
    """Logarithms of a device's two rates after one more pull; None as long as it has not trained."""
    report = pull.report
    moved = report.download_bytes + report.upload_bytes
    if report.outcome != TRAINED or pull.flops <= 0 or moved <= 0 or report.compute_seconds <= 0:
        return past
    now = (
        math.log(report.compute_seconds / pull.flops),
        math.log(max(report.download_seconds + report.upload_seconds, 1e-9) / moved),
    )
    past = past or now
    return (
        NEWEST_WEIGHT * now[0] + (1 - NEWEST_WEIGHT) * past[0],
        NEWEST_WEIGHT * now[1] + (1 - NEWEST_WEIGHT) * past[1],
    )


def rates_of(candidates: Sequence[Candidate], learned: dict[int, Rates]) -> list[Rates | None]:
    """A fresh probe of this round first, then what was learned, then the fleet's quantile; None before all."""
    fleet = None
    if learned:
        fleet = Rates(
            float(np.quantile([rates.seconds_per_flop for rates in learned.values()], UNSEEN_QUANTILE)),
            float(np.quantile([rates.seconds_per_byte for rates in learned.values()], UNSEEN_QUANTILE)),
        )
    return [own_rates(candidate, learned) or fleet for candidate in candidates]


def own_rates(candidate: Candidate, learned: dict[int, Rates]) -> Rates | None:
    """A fresh probe of this round first, then what was learned of this very device."""
    if candidate.probe:
        return Rates(candidate.probe.seconds_per_flop, candidate.probe.seconds_per_byte)
    return learned.get(candidate.device)
