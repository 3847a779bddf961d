"""A fixed rank for every device by its class of speed: the setting of HetLoRA (arXiv 2401.06432)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedspine.types import Action, Candidate, Pull


class TertilePolicy:
    """The smallest, the middle or the largest rank, by the tertile of a device's first probe among all probed so far.

    A device keeps its rank, less what it drops by itself (`rank_decay`), and one that was never probed has the middle
    one. No more pruning than demanded.
    """

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self._ranks = ranks[0], ranks[len(ranks) // 2], ranks[-1]

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        kept: dict[int, int] = {}
        probed: dict[int, float] = {}
        for pull in pulls:
            kept[pull.device] = pull.report.rank_after or pull.action.lora_rank
            if pull.probe:
                probed.setdefault(pull.device, pull.probe.seconds_per_flop)
        for candidate in candidates:
            if candidate.probe:
                probed.setdefault(candidate.device, candidate.probe.seconds_per_flop)
        fast, slow = np.quantile(list(probed.values()), (1 / 3, 2 / 3)) if probed else (0.0, 0.0)
        actions = []
        for candidate in candidates:
            place = 1
            if candidate.device in probed:
                speed = probed[candidate.device]
                place = 2 if speed <= fast else 1 if speed <= slow else 0
            rank = kept.get(candidate.device, self._ranks[place])
            actions.append(Action(candidate.min_ratio, min(max(rank, candidate.ranks[0]), candidate.ranks[-1])))
        return tuple(actions)
