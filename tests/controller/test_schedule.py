"""The sparsity floor and the range around it, by the formulas."""

from __future__ import annotations

import pytest

from fedspine.config import RunConfig
from fedspine.controller.schedule import allowed_range, floor_ratio, warmup_rounds

CUBIC = RunConfig(rounds=30, warmup_ratio=0.1, ramp_ratio=0.6, target_sparsity=0.5, max_step_ratio=0.15)
CONFIGS = [
    CUBIC,
    RunConfig(rounds=30, schedule="one-shot"),
    RunConfig(rounds=7, warmup_ratio=0.0, ramp_ratio=1.0, target_sparsity=0.9),
    RunConfig(rounds=1),
    RunConfig(rounds=2, ramp_ratio=0.2),
    RunConfig(rounds=5, warmup_ratio=0.5, ramp_ratio=0.55, max_step_ratio=0.0),
    RunConfig(rounds=12, target_sparsity=0.0),
    RunConfig(rounds=200, max_step_ratio=1.0),
]


def test_cubic_ramp() -> None:
    """Warm-up until round 3, target from round 18: 15 rounds of ramp."""
    assert [floor_ratio(CUBIC, round) for round in (1, 2, 3)] == [0.0, 0.0, 0.0]
    assert floor_ratio(CUBIC, 4) == pytest.approx(0.5 * (1 - (14 / 15) ** 3))
    assert floor_ratio(CUBIC, 8) == pytest.approx(0.5 * (1 - (2 / 3) ** 3))
    assert floor_ratio(CUBIC, 13) == pytest.approx(0.5 * (1 - (1 / 3) ** 3))
    assert [floor_ratio(CUBIC, round) for round in (18, 19, 30)] == [0.5, 0.5, 0.5]


def test_one_shot_jumps_after_the_warm_up() -> None:
    config = RunConfig(rounds=30, schedule="one-shot", target_sparsity=0.4)
    assert [floor_ratio(config, round) for round in (1, 3, 4, 30)] == [0.0, 0.0, 0.4, 0.4]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_floor_rises_from_zero_to_the_target(config: RunConfig) -> None:
    floors = [floor_ratio(config, round) for round in range(1, config.rounds + 1)]
    assert floors == sorted(floors)
    assert floors[0] == 0.0
    assert floors[-1] == (config.target_sparsity if config.rounds > 1 else 0.0)
    assert all(0 <= floor <= config.target_sparsity for floor in floors)


def test_there_is_always_a_round_of_warm_up() -> None:
    assert warmup_rounds(RunConfig(rounds=5)) == 1
    assert warmup_rounds(RunConfig(rounds=5, warmup_ratio=0.0)) == 1
    assert warmup_rounds(CUBIC) == 3
    assert warmup_rounds(RunConfig(rounds=20, warmup_ratio=0.25, ramp_ratio=0.6)) == 5


def test_allowed_range_around_the_floor() -> None:
    floor = floor_ratio(CUBIC, 8)  # 0.352
    assert allowed_range(CUBIC, 3, 0.0) == (0.0, 0.0)  # warm-up
    assert allowed_range(CUBIC, 8, 0.0) == (floor, floor)  # the floor demands more than the largest step
    assert allowed_range(CUBIC, 8, 0.3) == (floor, pytest.approx(0.45))
    assert allowed_range(CUBIC, 8, 0.4) == (0.4, 0.5)  # ahead of the floor; capped at the target
    assert allowed_range(CUBIC, 30, 0.5) == (0.5, 0.5)
    assert allowed_range(CUBIC, 30, 0.5001) == (0.5001, 0.5001)  # a cut meets its target to half a channel only


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("greedy", [False, True])
def test_a_device_never_grows_back_nor_leaps(config: RunConfig, greedy: bool) -> None:
    """Always at the lower end of the range, or always at the upper."""
    current = 0.0
    for round in range(1, config.rounds + 1):
        low, high = allowed_range(config, round, current)
        assert current <= low <= high <= config.target_sparsity
        assert floor_ratio(config, round) <= low
        assert high <= max(low, current + config.max_step_ratio)
        current = high if greedy else low
    assert current == floor_ratio(config, config.rounds)
