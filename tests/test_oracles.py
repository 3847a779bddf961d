"""Oracles of the algorithm, and the errors of published code that must not come back: those that no other file has.

The others, by what they hold:

- aggregation: aggregation/test_rules.py (one device alone is the identity; the dense weighted sum; dilution),
  aggregation/test_fold.py (exact sums), aggregation/test_baseline_rules.py (norms by the trace trick),
  test_baselines.py (averaging one factor averages the products)
- cutting: pruning/test_surgery.py (cut equals masked, before and after a step; every array is consumed),
  pruning/test_families.py (heads of the dependency graph, grouped attention), pruning/test_select.py (monotone masks,
  counted sparsity), federation/test_simulate.py (nothing comes back), lora/test_adapters.py (scale at every rank)
- scores: pruning/test_importance.py (the estimated gradient)
- bandits: controller/test_policies.py (leaves tile the square, discounts, the best cell, nothing is changed),
  controller/test_baseline_policies.py (E-UCB's index, FedMP's reward)
- clock: devices/test_clock.py (bandwidth), test_cost.py (more sparsity costs less)
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedspine import federation
from fedspine.aggregation import RULES
from fedspine.config import RunConfig
from fedspine.controller.policy import make_policy
from fedspine.controller.reward import reward_pulls
from fedspine.cost import Workload
from fedspine.lora.adapters import HEAD
from fedspine.pruning.importance import DECAY, SCORERS, per_unit
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.types import TRAINED, Action, Candidate, Pull, Report, TrainReply
from tests.aggregation.test_rules import SHAPE, START, update
from tests.small_run import KEYS, write_data, write_model
from tests.tiny import random_arrays, tiny_resident, tokens


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("oracles")
    return {**KEYS, "model": str(write_model(base / "model")), "data": str(write_data(base / "data")), "rounds": 3}


@pytest.mark.parametrize("rule", ["coordinate", "zero-pad"])
def test_fedit_is_the_mean_of_every_device(rule: str) -> None:
    """A pitfall of public code: a misspelt accumulator, and the first device alone is the average."""
    updates = [update(seed, weight) for seed, weight in ((1, 1.0), (2, 5.0), (3, 2.0))]
    result = RULES[rule](START, updates, SHAPE)
    for name in START:
        wanted = np.sum([item.weight / 8.0 * item.arrays[name] for item in updates], axis=0)
        np.testing.assert_allclose(result[name], wanted, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_averages_the_head(rule: str) -> None:
    updates = [update(seed, weight) for seed, weight in ((1, 1.0), (2, 5.0), (3, 2.0))]
    result = RULES[rule](START, updates, SHAPE)
    for name in filter(lambda name: name.startswith(HEAD), START):
        wanted = np.sum([item.weight / 8.0 * item.arrays[name] for item in updates], axis=0)
        np.testing.assert_allclose(result[name], wanted, atol=1e-6)


def test_the_averaged_head_reaches_the_devices(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pitfall of public code: the head is reset in every round, or a download is ignored under a wrong name."""
    plans: list[tuple[Any, list[TrainReply]]] = []
    exchange = federation.train_devices

    def listen(parts: Any, plan: Any, current: Any) -> list[TrainReply]:
        replies = exchange(parts, plan, current)
        plans.append((plan, replies))
        return replies

    monkeypatch.setattr(federation, "train_devices", listen)
    simulate(out=tmp_path / "run", **keys)
    for (_, replies), (plan, _) in pairwise(plans):
        total = sum(reply.report.examples for reply in replies)
        for name in filter(lambda name: name.startswith(HEAD), replies[0].arrays):
            mean = np.sum([reply.report.examples / total * reply.arrays[name] for reply in replies], axis=0)
            assert (mean != plans[0][0].requests[0].arrays[name]).any()
            for request in plan.requests:
                np.testing.assert_allclose(request.arrays[name], mean, atol=1e-6)


@pytest.mark.parametrize("name", ["fisher", "lora-gradient"])
def test_scores_are_a_moving_average_without_what_is_not_finite(name: str) -> None:
    """Bias-corrected: d S_1 + S_2 over d + 1."""
    resident = tiny_resident()
    full = Structure.full(resident.shape)

    def observe(scorer: Any, seeds: list[int]) -> Any:
        for seed in seeds:
            resident.mount(full, random_arrays(resident, seed=seed))
            torch.autograd.backward(resident.model(**tokens()).logits.square().mean())
            scorer.observe()
        scorer.close()
        return scorer.scores()

    first, second = (observe(SCORERS[name](resident, 0), [seed]) for seed in (0, 1))
    both = observe(SCORERS[name](resident, 0), [0, 1])
    for ours, one, two in zip(both, first, second, strict=True):
        for part, a, b in zip(ours, one, two, strict=True):
            np.testing.assert_allclose(part, (DECAY * a + b) / (DECAY + 1.0), rtol=1e-4)
    scorer = SCORERS[name](resident, 0)
    scorer.add([(np.full(4, 2.0, np.float32), np.full(32, 3.0, np.float32))] * 2)  # type: ignore[attr-defined]
    scorer.add([(np.full(4, np.nan, np.float32), np.ones(32, np.float32))] * 2)  # type: ignore[attr-defined]
    for heads, channels in scorer.scores():
        np.testing.assert_allclose(heads, 2.0, rtol=1e-6)
        np.testing.assert_allclose(channels, 3.0, rtol=1e-6)


def test_lora_gradient_scores_rank_like_the_true_ones() -> None:
    """|W' * dL/dW'| with the dense gradient, in LoRAPrune's normalisation: the order of the channels, loosely."""
    resident = tiny_resident(rank=12)
    shape, full = resident.shape, Structure.full(resident.shape)
    correlations = []
    for seed in range(4):
        arrays = random_arrays(resident, 12, seed)
        resident.mount(full, arrays)
        scorer = SCORERS["lora-gradient"](resident, 0)
        torch.autograd.backward(resident.model(**tokens()).logits.square().mean())
        scorer.observe()
        estimated = scorer.scores()
        resident.mount(full, arrays, merge=True)
        weights = {module.name: resident._linear(module.name).weight.requires_grad_() for module in shape.modules}
        torch.autograd.backward(resident.model(**tokens()).logits.square().mean())
        true = [np.zeros(shape.channels) for _ in range(shape.layers)]
        for module in shape.modules:
            if module.unit == "channels":
                weight = weights[module.name]
                vector = per_unit((weight * weight.grad).detach().abs(), module)
                true[module.layer] += (vector / vector.norm()).numpy()
        for layer in range(shape.layers):
            ranks = [np.argsort(np.argsort(values)) for values in (estimated[layer][1], true[layer])]
            correlations.append(np.corrcoef(*ranks)[0, 1])
    assert np.mean(correlations) > 0.5
    assert min(correlations) > 0.0


def test_a_round_lasts_as_long_as_its_slowest_device(keys: dict[str, Any], tmp_path: Path) -> None:
    clock = 0.0
    for record in simulate(out=tmp_path / "run", **keys).records:
        times = [pull.report.seconds + (pull.probe.seconds if pull.probe else 0.0) for pull in record.pulls]
        clock += max(times)
        assert record.round_seconds == max(times)
        assert record.clock_seconds == pytest.approx(clock)
        assert record.waiting_seconds == pytest.approx(max(times) - np.mean(times))
        assert record.waiting_seconds >= 0
        for pull in record.pulls:
            parts = pull.report.download_seconds, pull.report.compute_seconds, pull.report.upload_seconds
            assert pull.report.seconds == pytest.approx(sum(parts))
            assert min(parts) > 0


@pytest.mark.parametrize("seed", range(3))
def test_s_ucb_beats_one_choice_for_all_on_the_toy(seed: int) -> None:
    """Eight devices of three speeds, all in every round, where a choice does not bind the next one: the rounds get
    shorter, and their waiting too, than with the same ratio and rank for all."""
    slowness = np.array([1.0, 1.0, 1.0, 2.5, 2.5, 2.5, 6.0, 6.0])
    ranks, target = (4, 8, 16), 0.5

    def seconds(action: Action, slow: float) -> float:
        return slow * (1.0 - action.pruning_ratio + 0.04 * action.lora_rank)

    policy = make_policy(RunConfig(policy="s-ucb"), Workload(SHAPE, 1, 1, 9))
    cohort = [Candidate(device, 0.0, 0.0, target, ranks) for device in range(8)]
    past: list[Pull] = []
    times = []
    for round in range(1, 101):
        rng = np.random.default_rng([seed, round])
        pulls = []
        for device, action in enumerate(policy.suggest(round, cohort, past, (seed, round, 0, 2))):
            effect = 1.0 - 0.55 * float(np.exp(-action.lora_rank / 4))
            report = Report(
                TRAINED,
                compute_seconds=seconds(action, slowness[device]),
                loss_before=(effect + 0.1 * float(rng.normal())) / round,
                update_norm=effect,
            )
            pulls.append(Pull(round, device, action, 0.0, action.pruning_ratio, report, 1.0))
        past.extend(reward_pulls("paper", target, past, pulls))
        times.append([pull.report.seconds for pull in pulls])
    late = np.array(times[75:])
    same = np.array([seconds(Action(0.4, 16), slow) for slow in slowness])
    assert late.max(1).mean() < 0.9 * same.max()
    assert (late.max(1) - late.mean(1)).mean() < 0.9 * (same.max() - same.mean())
