"""One suite for every policy, then what each of them promises on its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest

from fedspine.config import RunConfig
from fedspine.controller.joint import Arms, Grid, arms_of, choose
from fedspine.controller.policy import Policy, feasible, make_policy, rank_grid
from fedspine.controller.reward import reward_pulls
from fedspine.controller.s_ucb import SUcbPolicy
from fedspine.controller.schedule import allowed_range
from fedspine.controller.simple import safe_action
from fedspine.controller.time_model import Rates, learn_rates, rates_of
from fedspine.controller.tree import grow, statistics
from fedspine.cost import Workload
from fedspine.devices.clock import VirtualMeter, device_state
from fedspine.devices.population import POPULATIONS, Population, load_population
from fedspine.errors import ConfigError
from fedspine.pruning.select import select
from fedspine.structure import ModelShape, ModuleShape, Structure
from fedspine.types import OUT_OF_MEMORY, TRAINED, Action, Candidate, Probe, Pull, Report
from tests.tiny import random_scores

POLICIES = RunConfig.__dataclass_fields__["policy"].metadata["key"].choices
RANKS = rank_grid(4, 16)
KEY = (7, 3, 0, 1)


def small_encoder() -> ModelShape:
    """The counts of a six-layer encoder of width 384."""
    hidden, heads, channels = 384, 12, 1536
    sizes = {
        "q": (hidden, hidden, "heads", "rows", (32,)),
        "v": (hidden, hidden, "heads", "rows", (32,)),
        "o": (hidden, hidden, "heads", "columns", (32,)),
        "up": (channels, hidden, "channels", "rows", (1,)),
        "down": (hidden, channels, "channels", "columns", (1,)),
    }
    modules = [ModuleShape(f"{layer}.{role}", layer, role, *size) for layer in range(6) for role, size in sizes.items()]
    return ModelShape(
        family="bert",
        layers=6,
        hidden=hidden,
        heads=heads,
        queries=1,
        head_dim=32,
        channels=channels,
        head_parameters=32 * (4 * hidden + 3),
        head_weights=32 * 4 * hidden,
        channel_parameters=2 * hidden + 1,
        channel_weights=2 * hidden,
        total_parameters=22_700_000,
        head_bytes=4 * 6 * (hidden + 1),
        modules=tuple(modules),
    )


SHAPE = small_encoder()
WORKLOAD = Workload(SHAPE, local_iterations=20, batch_size=8, length=32, score_bytes=4 * 6 * (12 + 1536))


def seconds_of(meter: VirtualMeter, ratio: float, rank: int) -> tuple[float, float, float]:
    """(compute, download, upload) seconds of a local round."""
    one_way = WORKLOAD.adapter_bytes(ratio, rank)
    return (
        meter.compute_seconds(WORKLOAD.planned_flops(ratio, rank), WORKLOAD.local_iterations),
        meter.download_seconds(one_way),
        meter.upload_seconds(one_way + WORKLOAD.score_bytes),
    )


def build(name: str, population: Population | None = None, **keys: object) -> Policy:
    config = RunConfig(policy=name, **keys)
    known = population or load_population("jetson-80", 80)

    def oracle(round: int, device: int, ratio: float, rank: int) -> float:
        return sum(seconds_of(VirtualMeter(device_state(known, config.seed, device, round)), ratio, rank))

    return make_policy(config, WORKLOAD, oracle)


def pull(
    device: int, ratio: float, rank: int, seconds: float = 2.0, round: int = 1, before: float = 0.0, reward: float = 0.0
) -> Pull:
    """A finished round whose time is half compute, a quarter download, a quarter upload."""
    moved = int(WORKLOAD.adapter_bytes(ratio, rank))
    report = Report(
        TRAINED,
        examples=10,
        compute_seconds=seconds / 2,
        download_seconds=seconds / 4,
        upload_seconds=seconds / 4,
        download_bytes=moved,
        upload_bytes=moved,
    )
    flops = WORKLOAD.planned_flops(ratio, rank)
    return Pull(round, device, Action(ratio, rank), before, ratio, report, flops, quality=0.5, reward=reward)


def lost(device: int, ratio: float, rank: int) -> Pull:
    return Pull(1, device, Action(ratio, rank), 0.0, 0.0, Report(OUT_OF_MEMORY), 0.0, reward=-1.0)


PAST = tuple(
    pull(device, ratio, rank, seconds=1.0 + device, round=1 + device // 3, before=ratio / 2, reward=0.1 * device)
    for device, ratio, rank in [(0, 0.0, 8), (1, 0.1, 4), (2, 0.2, 16), (3, 0.0, 4), (0, 0.1, 16), (4, 0.2, 8)]
)
COHORT = tuple(
    Candidate(device, low, low, high, RANKS)
    for device, low, high in [(0, 0.1, 0.25), (1, 0.1, 0.25), (3, 0.2, 0.2), (5, 0.1, 0.15), (9, 0.0, 0.5)]
)
COHORTS = {
    "some": COHORT,
    "one device": COHORT[:1],
    "nothing to prune": tuple(replace(candidate, max_ratio=candidate.min_ratio) for candidate in COHORT),
    "one rank": tuple(replace(candidate, ranks=(8,)) for candidate in COHORT),
    "at the target": tuple(replace(candidate, min_ratio=0.5, max_ratio=0.5) for candidate in COHORT),
    "probed": tuple(replace(c, probe=Probe(1e-12 * (1 + c.device), 1e-7, 0.1, 65536)) for c in COHORT),
}


def assert_allowed(actions: Sequence[Action], candidates: Sequence[Candidate]) -> None:
    for action, candidate in zip(actions, candidates, strict=True):
        assert candidate.min_ratio <= action.pruning_ratio <= candidate.max_ratio
        assert action.lora_rank in candidate.ranks
        assert type(action.pruning_ratio) is float
        assert type(action.lora_rank) is int


@pytest.mark.parametrize("past", [(), PAST], ids=["no past", "past"])
@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
@pytest.mark.parametrize("name", POLICIES)
def test_choices_are_allowed(name: str, cohort: tuple[Candidate, ...], past: tuple[Pull, ...]) -> None:
    policy = build(name)
    for draw in range(10):
        assert_allowed(policy.suggest(4, cohort, past, (*KEY, draw)), cohort)


@pytest.mark.parametrize("name", POLICIES)
def test_same_past_and_key_same_choices(name: str) -> None:
    """Also after other questions, and from a policy that was made anew: there is no state to save."""
    policy = build(name)
    first = policy.suggest(4, COHORT, PAST, KEY)
    policy.suggest(5, COHORT[1:], PAST[:2], (1, 2))
    assert policy.suggest(4, COHORT, PAST, KEY) == first
    assert build(name).suggest(4, COHORT, list(PAST), KEY) == first


@pytest.mark.parametrize("name", POLICIES)
def test_the_input_is_not_changed(name: str) -> None:
    cohort, past = list(COHORT), [*PAST, lost(0, 0.3, 16)]
    build(name).suggest(4, cohort, past, KEY)
    assert cohort == list(COHORT)
    assert past == [*PAST, lost(0, 0.3, 16)]


def rank_sixteen_brings_nothing() -> tuple[Pull, ...]:
    """The past of 60 equal devices and of a slow one, number 79, which leaves the others time for any rank."""
    equal = [pull(device, 0.1, RANKS[device % 3], 2.0, before=0.1) for device in range(60)]
    rewarded = [replace(one, quality=0.0 if one.action.lora_rank == 16 else 1.0) for one in equal]
    return (*rewarded, replace(pull(79, 0.1, 4, 8.0, before=0.1), quality=1.0))


@pytest.mark.parametrize("name", POLICIES)
def test_the_order_of_devices_does_not_matter(name: str) -> None:
    """Also when one of them may choose from fewer ranks, because it ran out of memory."""
    past = [*rank_sixteen_brings_nothing(), lost(0, 0.1, 8)]
    cohort = [Candidate(device, 0.1, 0.1, 0.1, RANKS) for device in (0, 1, 2, 3, 79)]
    forward = build(name).suggest(4, cohort, past, KEY)
    backward = build(name).suggest(4, cohort[::-1], past, KEY)
    assert backward[::-1] == forward


@pytest.mark.parametrize("name", POLICIES)
def test_what_ran_out_of_memory_is_left_out(name: str) -> None:
    policy = build(name, local_work="equal")
    cohort = [Candidate(device, 0.1, 0.1, 0.25, RANKS) for device in (0, 1)]
    for draw in range(10):
        action, _ = policy.suggest(4, cohort, [*PAST, lost(0, 0.25, 8)], (*KEY, draw))
        assert action == Action(0.25, 4)
        action, _ = policy.suggest(4, cohort, [*PAST, lost(0, 0.1, 4)], (*KEY, draw))
        assert action.pruning_ratio == 0.25  # as small as may be, then any rank is worth another try
    smallest_too = policy.suggest(4, cohort, [*PAST, lost(0, 0.25, 8), lost(0, 0.25, 4)], KEY)
    assert smallest_too[0] == Action(0.25, 4)


def test_another_device_keeps_its_ranks() -> None:
    cohort = [Candidate(device, 0.1, 0.1, 0.25, RANKS) for device in (0, 1)]
    first, second = feasible(cohort, [*PAST, lost(0, 0.3, 8)])
    assert (first.min_ratio, first.max_ratio, first.ranks) == (0.25, 0.25, (4,))
    assert second == cohort[1]


@lru_cache(maxsize=512)
def cut_to(ratio: float) -> Structure:
    return select(Structure.full(SHAPE), random_scores(SHAPE), ratio, SHAPE)


@dataclass(frozen=True)
class Played:
    """What became of a federation without training."""

    pulls: tuple[Pull, ...]
    round_seconds: tuple[float, ...]
    sparsities: dict[int, float]


def play(config: RunConfig, population: Population) -> Played:
    """All rounds of a federation with cut structures, virtual times and made-up losses; nothing is trained."""
    policy = build(config.policy, population, seed=config.seed, target_sparsity=config.target_sparsity)
    structures = {device: Structure.full(SHAPE) for device in range(config.devices)}
    pulls: list[Pull] = []
    times = []
    for round in range(1, config.rounds + 1):
        rng = np.random.default_rng([config.seed, round])
        devices = sorted(int(device) for device in rng.choice(config.devices, config.sampled, replace=False))
        before = [structures[device].sparsity(SHAPE) for device in devices]
        bounds = [allowed_range(config, round, ratio) for ratio in before]
        cohort = [Candidate(device, bound[0], *bound, RANKS) for device, bound in zip(devices, bounds, strict=True)]
        actions = policy.suggest(round, cohort, tuple(pulls), (config.seed, round, 0, 5))
        assert_allowed(actions, cohort)
        now = []
        for device, ratio, action in zip(devices, before, actions, strict=True):
            meter = VirtualMeter(device_state(population, config.seed, device, round))
            structure = cut_to(action.pruning_ratio) if action.pruning_ratio > ratio else structures[device]
            if meter.out_of_memory(WORKLOAD.memory_bytes(structure, action.lora_rank)):
                now.append(replace(lost(device, action.pruning_ratio, action.lora_rank), round=round))
                continue
            structures[device] = structure
            after = structure.sparsity(SHAPE)
            moved = int(WORKLOAD.adapter_bytes(after, action.lora_rank))
            compute, download, upload = seconds_of(meter, after, action.lora_rank)
            report = Report(
                TRAINED,
                examples=10,
                compute_seconds=compute,
                download_seconds=download,
                upload_seconds=upload,
                download_bytes=moved,
                upload_bytes=moved + WORKLOAD.score_bytes,
                loss_before=2.0 / round,
                loss_after=2.0 / (round + 1) + 0.1 * float(rng.random()),
                update_norm=1.0 - 0.5 * math.exp(-action.lora_rank / 4),
            )
            flops = WORKLOAD.planned_flops(after, action.lora_rank)
            now.append(Pull(round, device, action, ratio, after, report, flops))
        pulls.extend(reward_pulls(config.reward, config.target_sparsity, pulls, now))
        times.append(max(one.report.seconds for one in now))
    return Played(tuple(pulls), tuple(times), {d: s.sparsity(SHAPE) for d, s in structures.items()})


@pytest.mark.parametrize("name", POLICIES)
def test_a_federation_reaches_its_target(name: str) -> None:
    config = RunConfig(policy=name, devices=8, sampled=4, rounds=10)
    played = play(config, load_population("jetson-80", 8))
    assert len(played.pulls) == 40
    assert all(-1 <= one.reward <= 1 for one in played.pulls)
    for one in played.pulls:
        if one.round >= 6:
            assert one.ratio_after == pytest.approx(0.5, abs=1e-3)
        if one.round == 1:
            assert one.ratio_after == 0
    assert played == play(config, load_population("jetson-80", 8))


@pytest.mark.parametrize("name", POLICIES)
def test_devices_with_little_memory_learn_what_fits(name: str) -> None:
    """Memory for the uncut model at rank 4 only: after its first failures a device trains again."""
    usual = load_population("jetson-80", 4)
    limit = WORKLOAD.memory_bytes(Structure.full(SHAPE), 4) / 1e6 + 0.1
    weak = replace(usual, types=tuple(replace(kind, memory_mb=limit) for kind in usual.types))
    played = play(RunConfig(policy=name, devices=4, sampled=4, rounds=10), weak)
    failures = [one for one in played.pulls if one.report.outcome == OUT_OF_MEMORY]
    assert all(one.round <= 4 for one in failures)
    assert all(sparsity == pytest.approx(0.5, abs=1e-3) for sparsity in played.sparsities.values())


@pytest.mark.parametrize("name", POLICIES)
def test_a_real_device_that_lacked_memory_gets_what_needs_clearly_less(name: str) -> None:
    """Where the virtual one, whose memory is known exactly, gets the next smaller rank."""
    past = (lost(0, 0.0, 16),)
    cohort = (Candidate(0, 0.0, 0.0, 0.3, RANKS), Candidate(1, 0.0, 0.0, 0.3, RANKS))
    policy = make_policy(RunConfig(policy=name, cost="measured"), WORKLOAD, lambda *_: 1.0)
    first, _ = policy.suggest(2, cohort, past, KEY)
    assert first.pruning_ratio == 0.3
    memory = WORKLOAD.planned_memory_bytes
    assert memory(first.pruning_ratio, first.lora_rank) < 0.9 * memory(0.0, 16)
    uncut = tuple(replace(each, max_ratio=0.0) for each in cohort)
    fixed = RunConfig(policy="fixed", fixed_rank=16)
    virtual, real = (
        make_policy(each, WORKLOAD).suggest(2, uncut, past, KEY)[0] for each in (fixed, replace(fixed, cost="measured"))
    )
    assert (virtual.lora_rank, real.lora_rank) == (8, 4)  # an adapter less is not clearly less


def test_clairvoyance_needs_an_oracle() -> None:
    with pytest.raises(ConfigError, match="clairvoyant"):
        make_policy(RunConfig(policy="clairvoyant"), WORKLOAD)


def test_rank_grid_doubles_up_to_the_largest() -> None:
    assert rank_grid(4, 16) == (4, 8, 16)
    assert rank_grid(4, 24) == (4, 8, 16, 24)
    assert rank_grid(6, 6) == (6,)


# The time model


@pytest.mark.parametrize("name", ["fedspine", "time-model"])
def test_the_first_choice_is_the_safe_one(name: str) -> None:
    actions = build(name).suggest(1, COHORT, (), KEY)
    assert actions == tuple(Action(candidate.min_ratio, 8) for candidate in COHORT)
    assert actions == build("fixed").suggest(1, COHORT, (), KEY)


def test_the_safe_rank_is_the_nearest_one() -> None:
    assert safe_action(Candidate(0, 0.1, 0.1, 0.3, (4, 16)), 8) == Action(0.1, 4)
    assert safe_action(Candidate(0, 0.1, 0.1, 0.3, (4, 12, 32)), 20) == Action(0.1, 12)


def test_rates_are_averaged_in_the_log_domain() -> None:
    """Halved weight for what was before; a device that did not finish teaches nothing."""
    first, second = pull(0, 0.0, 8, seconds=1.0), pull(0, 0.3, 16, seconds=4.0)
    rates = learn_rates([first, lost(0, 0.1, 16), second])
    moved = [2 * one.report.download_bytes for one in (first, second)]
    assert list(rates) == [0]
    assert rates[0].seconds_per_flop == pytest.approx(math.sqrt(0.5 / first.flops * 2.0 / second.flops))
    assert rates[0].seconds_per_byte == pytest.approx(math.sqrt(0.5 / moved[0] * 2.0 / moved[1]))


def test_a_probe_goes_before_the_past_and_the_past_before_the_fleet() -> None:
    learned = {device: Rates(1e-12 * (device + 1), 1e-7 * (device + 1)) for device in range(6)}
    probed = Candidate(0, 0.0, 0.0, 0.1, RANKS, Probe(5e-11, 5e-6, 0.1, 65536))
    rates = rates_of([probed, Candidate(1, 0.0, 0.0, 0.1, RANKS), Candidate(9, 0.0, 0.0, 0.1, RANKS)], learned)
    assert rates[0] == Rates(5e-11, 5e-6)
    assert rates[1] == learned[1]
    assert rates[2] == Rates(pytest.approx(4e-12), pytest.approx(4e-7))
    assert rates_of([Candidate(9, 0.0, 0.0, 0.1, RANKS)], {}) == [None]


def predictions(population: Population, seen: tuple[float, int]) -> list[tuple[str, float, float]]:
    """(device type, predicted, true) seconds of every device and choice, after one noiseless round with `seen`."""
    quiet = replace(population, jitter=0.0, bandwidth_sigma=0.0)
    result = []
    for device in range(quiet.devices):
        state = device_state(quiet, 0, device, 1)
        compute, download, upload = seconds_of(VirtualMeter(state), *seen)
        moved = int(WORKLOAD.adapter_bytes(*seen))
        report = Report(
            TRAINED,
            compute_seconds=compute,
            download_seconds=download,
            upload_seconds=upload,
            download_bytes=moved,
            upload_bytes=moved + WORKLOAD.score_bytes,
        )
        past = Pull(1, device, Action(*seen), 0.0, seen[0], report, WORKLOAD.planned_flops(*seen))
        rates = learn_rates([past])[device]
        for ratio, rank in itertools.product((0.0, 0.25, 0.5), RANKS):
            predicted = rates.seconds_per_flop * WORKLOAD.planned_flops(ratio, rank)
            predicted += rates.seconds_per_byte * WORKLOAD.planned_bytes(ratio, rank)
            result.append((state.type_name, predicted, sum(seconds_of(VirtualMeter(state), ratio, rank))))
    return result


SEEN = [(0.0, 8), (0.0, 16), (0.3, 4), (0.5, 8)]


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("name", POPULATIONS)
def test_one_pull_predicts_every_time_without_fixed_costs(name: str, seen: tuple[float, int]) -> None:
    """Iterations and messages that cost work and bytes only; what is left is that scores travel up, never down."""
    population = replace(POPULATIONS[name], latency_ms=0.0)
    population = replace(population, types=tuple(replace(kind, iteration_ms=0.0) for kind in population.types))
    for _, predicted, true in predictions(population, seen):
        assert predicted == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("name", ["jetson-80", "jetson-80-communication-bound"])
def test_one_pull_predicts_the_times_of_slow_devices(name: str, seen: tuple[float, int]) -> None:
    """Fixed costs of iterations and messages are not in the model: a tenth for those that rounds wait for."""
    for kind, predicted, true in predictions(POPULATIONS[name], seen):
        assert predicted == pytest.approx(true, rel=0.1 if kind == "Jetson TX2" else 0.15)


# The joint decision


def brute_force(cohort: Sequence[Arms]) -> float:
    """The most quality per second over all combinations of arms."""
    best = -math.inf
    for arms in itertools.product(*(range(len(one.actions)) for one in cohort)):
        quality = sum(one.quality[arm] for one, arm in zip(cohort, arms, strict=True))
        best = max(best, quality / max(one.seconds[arm] for one, arm in zip(cohort, arms, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_joint_decision_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cohort = []
    for _ in range(1 + seed % 4):
        arms = int(rng.integers(1, 7))
        actions = tuple(Action(0.1 * arm, 4) for arm in range(arms))
        # coarse times, so that some are equal
        cohort.append(Arms(actions, rng.integers(1, 12, arms) / 2, 0.2 + rng.random(arms)))
    picked = [one.actions.index(action) for one, action in zip(cohort, choose(cohort), strict=True)]
    quality = sum(one.quality[arm] for one, arm in zip(cohort, picked, strict=True))
    slowest = max(one.seconds[arm] for one, arm in zip(cohort, picked, strict=True))
    assert quality / slowest == pytest.approx(brute_force(cohort), rel=1e-12)


def test_clairvoyant_equals_brute_force() -> None:
    """From the policy down, with the true times of three devices."""
    cohort = [Candidate(device, 0.1, 0.1, 0.25, (4, 16)) for device in (0, 1, 2)]
    population = load_population("jetson-80", 80)
    known = []
    for candidate in cohort:
        meter = VirtualMeter(device_state(population, 0, candidate.device, 3))
        actions = arms_of(candidate)
        seconds = [sum(seconds_of(meter, one.pruning_ratio, one.lora_rank)) for one in actions]
        known.append(Arms(actions, np.array(seconds), Grid.of([candidate]).prior()))
    actions = build("clairvoyant").suggest(3, cohort, (), KEY)
    picked = [arms.actions.index(action) for arms, action in zip(known, actions, strict=True)]
    quality = sum(arms.quality[arm] for arms, arm in zip(known, picked, strict=True))
    slowest = max(arms.seconds[arm] for arms, arm in zip(known, picked, strict=True))
    assert quality / slowest == pytest.approx(brute_force(known), rel=1e-12)


def test_many_deadlines_are_thinned_without_much_loss() -> None:
    rng = np.random.default_rng(0)
    actions = tuple(Action(0.001 * arm, 4) for arm in range(300))
    cohort = [Arms(actions, np.sort(rng.uniform(1, 9, 300)), np.sort(rng.random(300))) for _ in range(10)]
    picked = [one.actions.index(action) for one, action in zip(cohort, choose(cohort), strict=True)]
    quality = sum(one.quality[arm] for one, arm in zip(cohort, picked, strict=True))
    slowest = max(one.seconds[arm] for one, arm in zip(cohort, picked, strict=True))
    best = 0.0
    for deadline in np.concatenate([one.seconds for one in cohort]):
        if all(one.seconds[0] <= deadline for one in cohort):
            best = max(best, sum(one.quality[one.seconds <= deadline].max() for one in cohort) / deadline)
    assert 0.99 * best <= quality / slowest <= best * (1 + 1e-12)


@pytest.mark.parametrize("name", ["fedspine", "time-model"])
def test_slow_devices_get_cheaper_arms(name: str) -> None:
    """Devices that took 1, 2, 4 and 12 seconds for the same work: the slower, the fewer bytes to move."""
    past = [pull(device, 0.0, 8, seconds) for device, seconds in enumerate((1.0, 2.0, 4.0, 12.0))]
    cohort = [Candidate(device, 0.0, 0.0, 0.3, RANKS) for device in range(4)]
    actions = build(name).suggest(2, cohort, past, KEY)
    moved = [WORKLOAD.planned_bytes(action.pruning_ratio, action.lora_rank) for action in actions]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.5 * moved[0]
    assert actions[-1].lora_rank < actions[0].lora_rank


def test_a_slow_network_makes_ranks_small_and_a_fast_one_large() -> None:
    """The same devices and the same bounds: where bytes are cheap, rank is."""
    cohort = [Candidate(device, 0.1, 0.1, 0.25, RANKS) for device in range(40)]
    ranks = {}
    for name in POPULATIONS:
        actions = build("clairvoyant", load_population(name, 80)).suggest(1, cohort, (), KEY)
        assert_allowed(actions, cohort)
        ranks[name] = np.mean([action.lora_rank for action in actions])
    assert ranks["jetson-80-communication-bound"] <= ranks["jetson-80"] < ranks["jetson-80-compute-bound"]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["fedspine", "time-model"])
def test_learned_rates_beat_the_same_choice_for_all(name: str, seed: int) -> None:
    """In the time of all rounds and in prior quality per second; and knowing the true times is better still."""
    population = load_population("jetson-80", 12)
    results = {}
    for policy in (name, "fixed", "clairvoyant"):
        played = play(RunConfig(policy=policy, seed=seed, devices=12, sampled=6, rounds=16), population)
        quality = sum(1 - 0.55 * math.exp(-one.action.lora_rank / 4) for one in played.pulls)
        results[policy] = sum(played.round_seconds), quality / sum(played.round_seconds)
    assert results[name][0] < 0.9 * results["fixed"][0]
    assert results[name][1] > results["fixed"][1]
    assert results["clairvoyant"][1] > results[name][1]


def test_shared_experience_moves_the_joint_decision() -> None:
    """Where rank 16 brought nothing on many devices, FedSpine chooses it less than the bare time model."""
    cohort = [Candidate(device, 0.1, 0.1, 0.1, RANKS) for device in (0, 1, 2, 3, 79)]
    learned, bare = (
        [action.lora_rank for action in build(name).suggest(2, cohort, rank_sixteen_brings_nothing(), KEY)]
        for name in ("fedspine", "time-model")
    )
    assert bare[:4] == [16] * 4
    assert max(learned[:4]) <= 8


# S-UCB


def quarter(action: Action) -> tuple[bool, bool]:
    """Whether the choice lies in the upper half of the ratios up to 0.5, and of the log ranks."""
    return action.pruning_ratio >= 0.25, action.lora_rank >= 8


ANYWHERE = Candidate(0, 0.0, 0.0, 0.5, RANKS)


def drawn(own: Sequence[Pull], candidate: Candidate = ANYWHERE, draws: int = 20) -> list[Action]:
    policy = SUcbPolicy(0.5, RANKS)
    return [policy.suggest(9, [candidate], own, (*KEY, draw))[0] for draw in range(draws)]


def test_s_ucb_tries_the_unvisited_first() -> None:
    own = [pull(0, 0.1, 4, reward=1.0), pull(0, 0.1, 16, reward=1.0), pull(0, 0.4, 4, reward=1.0)]
    for action in drawn([*own, pull(5, 0.4, 16, reward=1.0)]):  # what another device did does not count
        assert action.pruning_ratio >= 0.25
        assert action.lora_rank >= 8


def test_s_ucb_by_hand() -> None:
    """Seven pulls, the newest last: weights 0.98^6 to 1, no leaf with the four samples that split it.

    Leaf of small ratios and ranks: 0.21 three times, of large ranks 0.2 once; the others 0.1 and 0.05. With
    N = 6.6, c sqrt(log(1 + N) / n) is 0.042 for the three oldest and 0.074 or less for the single ones, so the second
    leaf is ahead: 0.2 + 0.073 against 0.21 + 0.043.
    """
    rewards = [(0.1, 4, 0.21)] * 3 + [(0.1, 16, 0.2), (0.4, 4, 0.1), (0.4, 16, 0.05), (0.4, 16, 0.05)]
    own = [pull(0, ratio, rank, reward=reward) for ratio, rank, reward in rewards]
    weights = [0.98 ** (6 - index) for index in range(7)]
    total = sum(weights)
    index = {
        (False, False): 0.21 + 0.05 * math.sqrt(math.log(1 + total) / sum(weights[:3])),
        (False, True): 0.20 + 0.05 * math.sqrt(math.log(1 + total) / weights[3]),
        (True, False): 0.10 + 0.05 * math.sqrt(math.log(1 + total) / weights[4]),
        (True, True): 0.05 + 0.05 * math.sqrt(math.log(1 + total) / sum(weights[5:])),
    }
    best = max(index, key=lambda place: index[place])
    assert best == (False, True)
    assert {quarter(action) for action in drawn(own)} == {best}
    better = [*own[:2], replace(own[2], reward=0.33), *own[3:]]  # the first leaf's mean is now about 0.25
    assert {action.pruning_ratio < 0.25 for action in drawn(better)} == {True}
    assert {action.lora_rank <= 8 for action in drawn(better)} == {True}


def test_s_ucb_refines_where_it_has_been() -> None:
    """Four samples at a small ratio halve their leaf along the ratio; its empty half is next."""
    own = [pull(0, ratio, rank, reward=0.9) for ratio, rank in [(0.1, 16), (0.4, 4), (0.4, 16)]]
    own += [pull(0, 0.05, 4, reward=0.1)] * 4
    for action in drawn(own):
        assert 0.125 <= action.pruning_ratio < 0.25
        assert action.lora_rank in (4, 8)


def play_bandit(candidate: Candidate, reward: Callable[[Action], float], pulls: int, seed: int) -> list[Pull]:
    """One device whose reward depends on its choice only."""
    policy, own = SUcbPolicy(0.5, RANKS), []
    for number in range(pulls):
        (action,) = policy.suggest(number + 1, [candidate], own, (seed, number))
        own.append(pull(0, action.pruning_ratio, action.lora_rank, round=number + 1, reward=reward(action)))
    return own


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("ratio", "rank"), [(0.4, 8), (0.4, 4), (0.1, 16)])
def test_s_ucb_finds_the_best_cell(ratio: float, rank: int, seed: int) -> None:
    """Of a reward that falls with the distance to one choice: the last quarter is well above a uniform draw."""

    def reward(action: Action) -> float:
        return 1.0 - 2.0 * abs(action.pruning_ratio - ratio) - 0.25 * abs(math.log2(action.lora_rank / rank))

    late = [one.reward for one in play_bandit(ANYWHERE, reward, 100, seed)[-25:]]
    uniform = np.mean([reward(Action(ratio, rank)) for ratio in np.linspace(0, 0.5, 51) for rank in RANKS])
    assert np.mean(late) > uniform + 0.15


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", RANKS)
def test_s_ucb_finds_the_best_rank_when_the_ratio_is_fixed(rank: int, seed: int) -> None:
    """At the end of the ramp everybody is at the target: leaves of other ratios cannot be visited any more."""
    candidate = Candidate(0, 0.5, 0.5, 0.5, RANKS)
    own = play_bandit(candidate, lambda action: float(action.lora_rank == rank), 60, seed)
    assert np.mean([one.reward for one in own[-20:]]) > 0.6


@pytest.mark.parametrize("seed", range(3))
def test_leaves_tile_the_square(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.beta(0.5, 1.5, (80, 2))] + [(0.0, 0.0), (1.0, 1.0), (0.5, 1.0)]
    leaves = grow(points)
    areas = [(leaf.high[0] - leaf.low[0]) * (leaf.high[1] - leaf.low[1]) for leaf in leaves]
    assert sum(areas) == pytest.approx(1.0)
    assert len(leaves) > 8
    assert sorted(index for leaf in leaves for index in leaf.samples) == list(range(len(points)))
    for leaf in leaves:
        assert all(leaf.contains(points[index]) for index in leaf.samples)
    for point in [(float(x), float(y)) for x, y in rng.random((50, 2))]:
        assert sum(leaf.contains(point) for leaf in leaves) == 1


def test_statistics_discount_the_old() -> None:
    leaves = grow([(0.1, 0.1), (0.9, 0.9), (0.2, 0.2)])
    counts, means = statistics(leaves, [1.0, 0.5, 0.0], 0.9)
    place = next(index for index, leaf in enumerate(leaves) if leaf.samples == (0, 2))
    assert counts[place] == pytest.approx(1.81)
    assert means[place] == pytest.approx(0.81 / 1.81)
    assert counts.sum() == pytest.approx(2.71)
    assert set(means[counts == 0]) == {0.0}


# The controls


def test_random_choices_cover_what_is_allowed() -> None:
    actions = [build("random").suggest(1, [Candidate(0, 0.1, 0.1, 0.3, RANKS)], (), (0, draw))[0] for draw in range(60)]
    assert {action.lora_rank for action in actions} == set(RANKS)
    ratios = [action.pruning_ratio for action in actions]
    assert min(ratios) < 0.15
    assert max(ratios) > 0.25
