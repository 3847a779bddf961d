"""Local iterations by time (`local_work = "deadline"`), on top of any policy.

Slow devices do fewer, and all do more where links are what takes long.

The policy chooses ratio and rank as ever. Then the round gets a deadline, and each device as many iterations as fit,
from a quarter of `local_iterations` to twice as many. As in joint.py, the deadline is the one with the most value per
second, where w times as many iterations are worth w ** 0.75 to a device: an assumption between later steps that bring
less and what twice as many brought in experiments/levers, not a fit. So devices of one speed compute three times as
long as they transfer, if the bounds allow: the longer the way, the more is done before it is taken. The deadline is
no earlier than the median of the predicted times with `local_iterations`, nor than what the slowest needs for a
quarter of them: where nothing is to be gained from the links, most devices do what the configuration says. So does a
device of which nothing is known, neither from its past nor from a probe.

Aggregation weighs a device by its examples, whatever its iterations. Fewer steps have moved its adapters less, so that
it counts for less already; to scale that up, as FedNova does (arXiv 2007.07481), would scale up the noise of few
batches, and to count it for less still would cost the slow devices their say twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedspine.config import deadline_bounds
from fedspine.controller.policy import Policy
from fedspine.controller.time_model import learn_rates, own_rates
from fedspine.cost import Workload
from fedspine.types import Action, Candidate, Pull

WORTH = 0.75
"""Power of the iterations that is their worth."""

Floats = NDArray[np.float64]


class DeadlinePolicy:
    """Any policy's actions, with the iterations that fit."""

    def __init__(self, policy: Policy, workload: Workload) -> None:
        self._policy = policy
        self._workload = workload

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        actions = list(self._policy.suggest(round, candidates, pulls, key))
        learned = learn_rates(pulls)
        rates = [own_rates(candidate, learned) for candidate in candidates]
        known = [(place, rate) for place, rate in enumerate(rates) if rate is not None]
        if known:
            ratios = np.array([actions[place].pruning_ratio for place, _ in known])
            ranks = np.array([float(actions[place].lora_rank) for place, _ in known])
            compute = self._workload.planned_flops(ratios, ranks) * [
                rate.seconds_per_flop * self._workload.layers_share(actions[place]) for place, rate in known
            ]
            transfer = self._workload.planned_bytes(ratios, ranks) * [rate.seconds_per_byte for _, rate in known]
            fitting = fitting_iterations(compute, transfer, self._workload.local_iterations)
            for (place, _), iterations in zip(known, fitting, strict=True):
                actions[place] = replace(actions[place], iterations=iterations)
        return tuple(actions)


def fitting_iterations(compute: Floats, transfer: Floats, full: int) -> list[int]:
    """Local iterations per device [devices] under the common deadline.

    `compute`: predicted seconds of `full` iterations; `transfer`: of all transfers, which iterations do not change.
    """
    least, most = deadline_bounds(full)
    earliest = max(np.median(compute + transfer), np.max(compute * (least / full) + transfer))
    ends = np.multiply.outer(np.linspace(1, most / full, 9), compute) + transfer  # [9, devices]
    deadlines = np.unique([earliest, *ends[ends > earliest]])
    fitting = np.floor(full * (deadlines[:, None] - transfer) / compute * (1 + 1e-9))
    fitting = np.clip(fitting, least, most)
    best = int(np.argmax(((fitting / full) ** WORTH).sum(axis=1) / deadlines))
    return [int(iterations) for iterations in fitting[best]]
