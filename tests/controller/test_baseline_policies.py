"""E-UCB of FedMP and the fixed ranks of HetLoRA: what each promises on its own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fedspine.controller.e_ucb import DISCOUNT, THETA, EUcbPolicy, discounted, partition, piece
from fedspine.controller.reward import KAPPA, reward_pulls
from fedspine.controller.tertile import TertilePolicy
from fedspine.types import TRAINED, Action, Candidate, Probe, Pull, Report

RANKS = (4, 8, 16)
KEY = (7, 3, 0, 2)
ANY = Candidate(0, 0.0, 0.0, 0.5, RANKS)


def pull(ratio: float, reward: float = 0.0, device: int = 0, rank: int = 8, probe: Probe | None = None) -> Pull:
    return Pull(1, device, Action(ratio, rank), 0.0, ratio, Report(TRAINED), 1.0, probe, reward=reward)


def test_pieces_tile_and_counts_are_the_discounted_total() -> None:
    points = np.random.default_rng(0).random(60).tolist()
    edges = partition(points)
    assert (edges[0], edges[-1]) == (0.0, 1.0)
    assert edges == sorted(set(edges))
    assert len(edges) > 10
    counts, means = discounted(edges, points, points)
    assert counts.sum() == pytest.approx(sum(DISCOUNT**age for age in range(60)))
    for place in range(len(counts)):
        inside = [(59 - i, p) for i, p in enumerate(points) if edges[place] <= p < edges[place + 1]]
        total = sum(DISCOUNT**age for age, _ in inside)
        assert counts[place] == pytest.approx(total)
        wanted = sum(DISCOUNT**age * point for age, point in inside) / total if inside else 0.0
        assert means[place] == pytest.approx(wanted)


def test_short_pieces_are_not_split() -> None:
    edges = partition([THETA, 0.5 * THETA, 0.5, 0.5, 0.0, 1.0])
    assert edges == [0.0, THETA, 0.5, 1.0]
    assert piece(edges, 1.0) == 2


def test_the_largest_index_is_chosen() -> None:
    """Three pieces with samples: mean + sqrt(2 log n / N) by hand."""
    past = [pull(0.1, 0.1), pull(0.3, 0.9), pull(0.05, 0.2), pull(0.35, 0.8), pull(0.4, -1.0)]
    edges = partition([p.action.pruning_ratio / 0.5 for p in past])
    counts, means = discounted(edges, [p.action.pruning_ratio / 0.5 for p in past], [p.reward for p in past])
    if (counts == 0).any():
        best = int(np.flatnonzero(counts == 0)[0])
    else:
        best = int(np.argmax(means + np.sqrt(2 * math.log(counts.sum()) / counts)))
    (action,) = EUcbPolicy(0.5, 8).suggest(6, [ANY], past, KEY)
    assert edges[best] <= action.pruning_ratio / 0.5 <= edges[best + 1]
    assert action.lora_rank == 8


def test_finds_the_best_ratio() -> None:
    """A stationary reward with its peak at 0.35 of 0.5: the second half of 300 draws is nearer to it than chance."""
    policy, past = EUcbPolicy(0.5, 8), []
    for round in range(300):
        (action,) = policy.suggest(round, [ANY], past, (0, round, 0, 2))
        past.append(pull(action.pruning_ratio, 6.0 * (1.0 - abs(action.pruning_ratio - 0.35) / 0.35)))
    late = [abs(p.action.pruning_ratio - 0.35) for p in past[150:]]
    chance = np.abs(np.random.default_rng(0).uniform(0, 0.5, 10_000) - 0.35).mean()
    assert np.mean(late) < 0.8 * chance


def test_a_cut_is_for_good() -> None:
    past = [pull(0.1, 1.0), pull(0.2, -1.0), pull(0.45, 0.5)]
    for low, high in ((0.3, 0.4), (0.5, 0.5), (0.0, 0.0)):
        (action,) = EUcbPolicy(0.5, 8).suggest(4, [replace(ANY, min_ratio=low, max_ratio=high)], past, KEY)
        assert low <= action.pruning_ratio <= high


def test_reward_of_fedmp_by_hand() -> None:
    def timed(seconds: float, gain: float) -> Pull:
        report = Report(TRAINED, compute_seconds=seconds, loss_before=1.0, loss_after=1.0 - gain)
        return replace(pull(0.2), report=report)

    first, second = reward_pulls("fedmp", 0.5, [], [timed(1.0, 0.2), timed(3.0, -0.1)])
    assert first.reward == pytest.approx(1.0 * KAPPA / (0.5 + KAPPA))
    assert second.reward == pytest.approx(-0.5 * KAPPA / (0.5 + KAPPA))


def test_ranks_by_tertile_of_speed_and_for_good() -> None:
    """Nine devices, the fastest first; a device that was slow among slower ones keeps what it got."""
    cohort = [replace(ANY, device=k, probe=Probe(1e-12 * (1 + k), 1e-7, 0.1, 1)) for k in range(9)]
    policy = TertilePolicy(RANKS)
    actions = policy.suggest(1, cohort, [], KEY)
    assert [action.lora_rank for action in actions] == [16] * 3 + [8] * 3 + [4] * 3
    past = [pull(0.0, 0.0, c.device, a.lora_rank, c.probe) for c, a in zip(cohort, actions, strict=True)]
    faster = replace(ANY, device=20, probe=Probe(1e-15, 1e-7, 0.1, 1))
    again = policy.suggest(2, [*(replace(c, probe=None) for c in cohort), faster], past, KEY)
    assert [action.lora_rank for action in again] == [16] * 3 + [8] * 3 + [4] * 3 + [16]
    assert policy.suggest(1, [ANY], [], KEY)[0].lora_rank == 8
