"""The reward of a choice, from the four ingredients that the paper names.

Local-loss improvement, pruning progress, importance of the LoRA update, and completion time relative to the others
(FedSpine, arXiv 2501.02438; the functional forms are reconstructions). The first three make the time-free `quality`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from fedspine.types import TRAINED, Pull

LOSS_WEIGHT, PROGRESS_WEIGHT, UPDATE_WEIGHT = 0.3, 0.5, 0.5
"""Loss improvement weighs little: under label skew its spread is mostly noise."""
KAPPA = 0.1
"""Bounds the paper's form near the mean time."""
LATENESS_WEIGHT = 0.7
REFERENCE_DECAY = 0.8
"""Of the reference time of one-sided lateness: a moving average of round medians in the log domain."""


def reward_pulls(kind: str, target: float, past: Sequence[Pull], current: Sequence[Pull]) -> tuple[Pull, ...]:
    """Fill in `quality` (0..1 or slightly below 0) and `reward` (-1..1) of a round's pulls.

    `paper`: quality / (|T - mean T| / mean T + kappa) * kappa, the bounded form of FedMP's reward.
    `fedmp`: the same with the loss improvement alone, relative to the largest of the round, as quality.
    `lateness`: quality - 0.7 * clip(T / T_ref - 1, 0, 2), only being late costs.
    A device that did not finish gets quality 0 and reward -1.
    """
    trained = [pull for pull in current if pull.report.outcome == TRAINED]
    largest_gain = max((abs(_gain(pull)) for pull in trained), default=0.0) or 1.0
    largest_norm = max((pull.report.update_norm for pull in trained), default=0.0) or 1.0
    if kind == "fedmp":
        gains = [_gain(pull) / largest_gain for pull in current]
        return with_rewards(kind, current, gains, reference_seconds(past, current))
    qualities = [
        (
            LOSS_WEIGHT * _gain(pull) / largest_gain
            + PROGRESS_WEIGHT * cut_share(target, pull.ratio_before, pull.ratio_after)
            + UPDATE_WEIGHT * pull.report.update_norm / largest_norm
        )
        / (LOSS_WEIGHT + PROGRESS_WEIGHT + UPDATE_WEIGHT)
        for pull in current
    ]
    return with_rewards(kind, current, qualities, reference_seconds(past, current))


def cut_share(target: float, before: float, after: float) -> float:
    """Pruning progress of a round: the share of what was left to cut, at most 1; 0 when nothing was left."""
    left = max(target - before, 0.0)
    return min((after - before) / left, 1.0) if left > 1e-6 else 0.0


def with_rewards(kind: str, current: Sequence[Pull], qualities: Sequence[float], reference: float) -> tuple[Pull, ...]:
    """The pulls with these qualities and the rewards that follow from them, see `reward_pulls`."""
    trained = [pull for pull in current if pull.report.outcome == TRAINED]
    mean_time = sum(pull.report.seconds for pull in trained) / len(trained) if trained else 0.0
    result = []
    for pull, quality in zip(current, qualities, strict=True):
        if pull.report.outcome != TRAINED:
            result.append(replace(pull, quality=0.0, reward=-1.0))
            continue
        if kind != "lateness":
            spread = abs(pull.report.seconds - mean_time) / mean_time if mean_time > 0 else 0.0
            reward = quality * KAPPA / (spread + KAPPA)
        else:
            late = pull.report.seconds / reference - 1.0 if reference > 0 else 0.0
            reward = quality - LATENESS_WEIGHT * min(max(late, 0.0), 2.0)
        result.append(replace(pull, quality=quality, reward=max(-1.0, min(1.0, reward))))
    return tuple(result)


def reference_seconds(past: Sequence[Pull], current: Sequence[Pull]) -> float:
    """Moving average, in the log domain, of the rounds' median completion times, the current round included."""
    rounds: dict[int, list[Pull]] = {}
    for pull in (*past, *current):
        rounds.setdefault(pull.round, []).append(pull)
    value: float | None = None
    for round in sorted(rounds):
        value = log_reference(value, rounds[round])
    return math.exp(value) if value is not None else 0.0


def log_reference(before: float | None, pulls: Sequence[Pull]) -> float | None:
    """Logarithm of the reference seconds after one more round; None as long as nobody has finished."""
    times = [pull.report.seconds for pull in pulls if pull.report.outcome == TRAINED and pull.report.seconds > 0]
    if not times:
        return before
    now = math.log(median(times))
    return now if before is None else REFERENCE_DECAY * before + (1.0 - REFERENCE_DECAY) * now


def _gain(pull: Pull) -> float:
    return pull.report.loss_before - pull.report.loss_after
