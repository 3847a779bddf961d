"""Adapters on the top layers only, for slow devices (`slow_layers`), on top of any policy.

The policy chooses ratio and rank as ever. Then every device that is predicted to take clearly longer than the median of
its round trains the adapters of the top layers only: the layers below compute forward, their adapters stay as they were
received, and neither their gradients nor their activations are needed, so that an iteration costs less time and memory,
and less is uploaded. The lowest layers change least in tuning (the reason why layers are frozen bottom-up, as in
AutoFreeze, arXiv 2102.01386). Importance of the layers below is not measured by such a device. A device of which
nothing is known, neither from its past nor from a probe, trains all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from fedspine.controller.policy import Policy
from fedspine.controller.time_model import Rates, learn_rates, own_rates
from fedspine.cost import Workload
from fedspine.types import Action, Candidate, Pull

CLEARLY = 1.2
"""Times the median, from which on a device is slow: among devices of like speed none is."""


class TopLayersPolicy:
    """Any policy's actions, with `layers` for slow devices."""

    def __init__(self, policy: Policy, workload: Workload, layers: int) -> None:
        self._policy = policy
        self._workload = workload
        self._layers = layers

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        actions = self._policy.suggest(round, candidates, pulls, key)
        learned = learn_rates(pulls)
        seconds = [self._seconds(*pair, learned) for pair in zip(candidates, actions, strict=True)]
        known = [each for each in seconds if each is not None]
        bound = CLEARLY * median(known) if known else 0.0
        return tuple(
            action if each is None or each <= bound else replace(action, layers=self._layers)
            for action, each in zip(actions, seconds, strict=True)
        )

    def _seconds(self, candidate: Candidate, action: Action, learned: dict[int, Rates]) -> float | None:
        """Predicted, of a local round with all layers."""
        rates = own_rates(candidate, learned)
        if rates is None:
            return None
        ratio, rank = action.pruning_ratio, float(action.lora_rank)
        compute = self._workload.planned_flops(ratio, rank) * rates.seconds_per_flop
        return compute + self._workload.planned_bytes(ratio, rank) * rates.seconds_per_byte
