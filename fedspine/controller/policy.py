"""The seam between the round and whoever decides it.

A policy knows the tuple of past pulls and nothing else: `suggest` replays them and never changes state, so there is
nothing to save, and a crashed round is planned again to the same plan. To add a policy, write a file with a class that
has `suggest` and name it in `make_policy`; the suite in `tests/controller` runs every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from fedspine.config import RunConfig
from fedspine.cost import Workload
from fedspine.errors import ConfigError
from fedspine.types import OUT_OF_MEMORY, Action, Candidate, Pull

Oracle = Callable[[int, int, float, int], float]
"""(round, device, pruning ratio, rank) to the true seconds: what only a simulator knows."""

MemoryModel = Callable[[float, int], float]
"""(pruning ratio, rank) to bytes."""
CLEARLY_LESS = 0.9
"""Of the memory that a real device lacked."""


class Policy(Protocol):
    """Chooses an action for every sampled device."""

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        """One action per candidate, within its bounds. Pure: `key` seeds whatever is drawn."""


def rank_grid(min_rank: int, max_rank: int) -> tuple[int, ...]:
    """Powers of two from `min_rank` up, and `max_rank`."""
    ranks = []
    rank = min_rank
    while rank < max_rank:
        ranks.append(rank)
        rank *= 2
    return (*ranks, max_rank)


def pulls_by_device(candidates: Sequence[Candidate], pulls: Sequence[Pull]) -> dict[int, list[Pull]]:
    """The past pulls of every candidate, oldest first."""
    own: dict[int, list[Pull]] = {candidate.device: [] for candidate in candidates}
    for pull in pulls:
        if pull.device in own:
            own[pull.device].append(pull)
    return own


def feasible(
    candidates: Sequence[Candidate], pulls: Sequence[Pull], needed: MemoryModel | None = None
) -> tuple[Candidate, ...]:
    """Drop ranks at which a device has run out of memory, at this ratio or a higher one; the smallest always stays.

    `needed`: for real devices, what the cost formula says of a (ratio, rank). Theirs is not exact, so whatever needs
    hardly less than what did not fit is dropped too.
    """
    lost: dict[int, list[Action]] = {}
    for pull in pulls:
        if pull.report.outcome == OUT_OF_MEMORY:
            lost.setdefault(pull.device, []).append(pull.action)
    return tuple(
        _without(candidate, lost[candidate.device], needed) if candidate.device in lost else candidate
        for candidate in candidates
    )


def _without(candidate: Candidate, lost: Sequence[Action], needed: MemoryModel | None) -> Candidate:
    def like(rank: int, action: Action) -> bool:
        same = rank >= action.lora_rank and candidate.max_ratio <= action.pruning_ratio + 1e-9
        if same or needed is None:
            return same
        return needed(candidate.max_ratio, rank) > CLEARLY_LESS * needed(action.pruning_ratio, action.lora_rank)

    ranks = [rank for rank in candidate.ranks if not any(like(rank, action) for action in lost)]
    # Cut as far as the round allows: a smaller model needs less.
    return replace(candidate, min_ratio=candidate.max_ratio, ranks=tuple(ranks) or candidate.ranks[:1])


class _Feasible:
    """Any policy, with what ran out of memory left out."""

    def __init__(self, policy: Policy, needed: MemoryModel | None) -> None:
        self._policy = policy
        self._needed = needed

    def suggest(
        self, round: int, candidates: Sequence[Candidate], pulls: Sequence[Pull], key: tuple[int, ...]
    ) -> tuple[Action, ...]:
        return self._policy.suggest(round, feasible(candidates, pulls, self._needed), pulls, key)


def make_policy(config: RunConfig, workload: Workload, oracle: Oracle | None = None) -> Policy:
    """The policy that the configuration names.

    Errors: `ConfigError` when the clairvoyant policy is asked for without a simulator's oracle.
    """
    from fedspine.controller.deadline import DeadlinePolicy
    from fedspine.controller.e_ucb import EUcbPolicy
    from fedspine.controller.joint import Clairvoyant, FedSpinePolicy, TimeModelPolicy
    from fedspine.controller.s_ucb import SUcbPolicy
    from fedspine.controller.simple import FixedPolicy, RandomPolicy
    from fedspine.controller.tertile import TertilePolicy
    from fedspine.controller.top_layers import TopLayersPolicy

    safe = config.fixed_rank
    ranks = rank_grid(config.min_rank, config.max_rank)
    policies: dict[str, Callable[[], Policy]] = {
        "fedspine": lambda: FedSpinePolicy(workload, safe, ranks),
        "time-model": lambda: TimeModelPolicy(workload, safe),
        "s-ucb": lambda: SUcbPolicy(config.target_sparsity, ranks),
        "e-ucb": lambda: EUcbPolicy(config.target_sparsity, safe),
        "tertile": lambda: TertilePolicy(ranks),
        "fixed": lambda: FixedPolicy(safe),
        "random": RandomPolicy,
    }
    if oracle is not None:
        policies["clairvoyant"] = partial(Clairvoyant, oracle)
    elif config.policy == "clairvoyant":
        raise ConfigError("policy = 'clairvoyant': it knows the true times, so it runs in simulations only")
    needed = workload.planned_memory_bytes if config.cost == "measured" else None
    policy: Policy = _Feasible(policies[config.policy](), needed)
    if config.slow_layers:
        policy = TopLayersPolicy(policy, workload, config.slow_layers)
    return DeadlinePolicy(policy, workload) if config.local_work == "deadline" else policy
