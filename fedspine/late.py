"""Rounds that close before their last reply (`close_at` below 1): semi-synchronous, with bounded staleness.

A round closes when that share of its devices has trained and replied, on the virtual clock. A device that is still at
work is busy and is not sampled; its reply joins the round in which it arrives, s rounds after it was asked, with the
weight of its examples / (1 + s)^0.5 (FedAsync, arXiv 1903.03934, polynomial staleness), or is dropped when s is above
`max_staleness`. Policies and scores learn from it then, and not before.

A late reply is joined as every other: by what the device's adapters are, not by how they have changed. In product space
the global product moves towards the device's by its share of the weight, and so, a little, back to where the device
began; that is what the discount is for. What has not arrived when the run ends is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from fedspine.types import TRAINED, Pull, TrainReply

STALENESS_POWER = 0.5


@dataclass(frozen=True)
class Awaited:
    """What is known of a reply on its way."""

    pull: Pull
    """Without quality and reward: those compare it with the others of the round in which it arrives."""
    seconds: float
    """Until it arrives, counted from the start of the round that is under way, or is next."""

    def discount(self, round: int, most: int) -> float:
        """Of its weight in a round, 0..1; 0 when it is staler than `most` rounds."""
        staleness = round - self.pull.round
        return float((1 + staleness) ** -STALENESS_POWER) if staleness <= most else 0.0


@dataclass(frozen=True)
class AwaitedReply(Awaited):
    """With the reply itself."""

    reply: TrainReply


T = TypeVar("T", bound=Awaited)


@dataclass(frozen=True)
class Closing(Generic[T]):
    """How a round ended."""

    seconds: float
    """Its length."""
    waiting_seconds: float
    """Mean over the replies that arrived of the time from then to the end of the round."""
    arrived: tuple[T, ...]
    """Of earlier rounds first, in the order in which they were asked."""
    late: tuple[T, ...]


def close_round(close_at: float, asked: Sequence[T], earlier: Sequence[T]) -> Closing[T]:
    """Close a round whose devices are `asked`, some of which have trained; `earlier`: late already when it began.

    `close_at`: share of the devices asked; with 1 all are waited for, also those that fail.
    """
    seconds = max(each.seconds for each in asked)
    if close_at < 1.0:
        done = sorted(each.seconds for each in asked if each.pull.report.outcome == TRAINED)
        seconds = done[min(len(done), math.ceil(close_at * len(asked) - 1e-9)) - 1]
    arrived = tuple(each for each in (*earlier, *asked) if each.seconds <= seconds)
    late = (replace(each, seconds=each.seconds - seconds) for each in (*earlier, *asked) if each.seconds > seconds)
    waiting = sum(seconds - each.seconds for each in arrived) / len(arrived)
    return Closing(seconds, waiting, arrived, tuple(late))
