"""Quality and reward of a round by hand, from the formulas of the docstrings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedspine.controller.reward import reference_seconds, reward_pulls
from fedspine.types import FAILED, OUT_OF_MEMORY, TRAINED, Action, Pull, Report

KINDS = ["paper", "lateness"]


def pull(
    seconds: float, gain: float = 0.0, ratios: tuple[float, float] = (0.0, 0.0), norm: float = 0.0, round: int = 1
) -> Pull:
    report = Report(TRAINED, compute_seconds=seconds, loss_before=2.0, loss_after=2.0 - gain, update_norm=norm)
    return Pull(round, 0, Action(ratios[1], 8), *ratios, report, 1e9)


def failed(outcome: str = FAILED, round: int = 1) -> Pull:
    report = Report(outcome, compute_seconds=50.0, loss_before=9.0, update_norm=9.0)
    return Pull(round, 1, Action(0.1, 8), 0.1, 0.1, report, 1e9, quality=0.3, reward=0.3)


ROUND = (
    pull(1.0, gain=0.4, ratios=(0.1, 0.3), norm=2.0),
    pull(2.0, gain=-0.2, ratios=(0.3, 0.4), norm=1.0),
    pull(6.0, gain=0.1, ratios=(0.5, 0.5), norm=0.5),
)
QUALITIES = (
    (0.3 * 1.0 + 0.5 * 0.5 + 0.5 * 1.0) / 1.3,  # the largest gain and norm; half of what was left to cut
    (0.3 * -0.5 + 0.5 * 0.5 + 0.5 * 0.5) / 1.3,
    (0.3 * 0.25 + 0.5 * 0.0 + 0.5 * 0.25) / 1.3,  # nothing left to cut
)


@pytest.mark.parametrize("kind", KINDS)
def test_quality_weighs_gain_progress_and_update(kind: str) -> None:
    rewarded = reward_pulls(kind, 0.5, (), ROUND)
    assert [one.quality for one in rewarded] == pytest.approx(QUALITIES)


def test_paper_form_is_bounded_near_the_mean_time() -> None:
    """Mean 3 s: a third off costs most of the reward, either way."""
    spreads = (2 / 3, 1 / 3, 1.0)
    expected = [quality * 0.1 / (spread + 0.1) for quality, spread in zip(QUALITIES, spreads, strict=True)]
    assert [one.reward for one in reward_pulls("paper", 0.5, (), ROUND)] == pytest.approx(expected)
    alone = reward_pulls("paper", 0.5, (), ROUND[:1])[0]
    assert alone.reward == pytest.approx(alone.quality)  # at the mean


def test_only_being_late_costs() -> None:
    """Reference 2 s, the median: the fast one is not punished, the slow one pays 0.7 per multiple, at most twice."""
    expected = [QUALITIES[0], QUALITIES[1], max(-1.0, QUALITIES[2] - 0.7 * 2.0)]
    assert [one.reward for one in reward_pulls("lateness", 0.5, (), ROUND)] == pytest.approx(expected)
    late = (*ROUND[:2], replace(ROUND[2], report=replace(ROUND[2].report, compute_seconds=3.0)))
    assert reward_pulls("lateness", 0.5, (), late)[2].reward == pytest.approx(QUALITIES[2] - 0.7 * 0.5)


def test_reference_is_a_log_average_of_round_medians() -> None:
    """Medians 2, 4 and 16 seconds: 0.8 of what was, 0.2 of what is. Order of the pulls and failures do not count."""
    past = [pull(4.0, round=2), *[pull(seconds, round=1) for seconds in (1.0, 2.0, 9.0)], failed(round=2)]
    current = [pull(16.0, round=3), failed(OUT_OF_MEMORY, round=3)]
    expected = math.exp(0.8 * (0.8 * math.log(2) + 0.2 * math.log(4)) + 0.2 * math.log(16))
    assert reference_seconds(past, current) == pytest.approx(expected)
    assert reference_seconds([], current) == pytest.approx(16.0)
    assert reference_seconds([], []) == 0.0


def test_the_past_shifts_the_reference_only() -> None:
    past = [pull(1.0, round=1), pull(1.0, round=2)]
    current = [replace(one, round=3) for one in ROUND]
    rewarded = reward_pulls("lateness", 0.5, past, current)
    assert [one.quality for one in rewarded] == pytest.approx(QUALITIES)
    reference = math.exp(0.2 * math.log(2))
    assert rewarded[1].reward == pytest.approx(QUALITIES[1] - 0.7 * (2 / reference - 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outcome", [OUT_OF_MEMORY, FAILED])
def test_who_did_not_finish_gets_the_worst_and_does_not_count(kind: str, outcome: str) -> None:
    """Its times, losses and norms change nobody else's reward; places in the round stay."""
    alone = reward_pulls(kind, 0.5, (), ROUND)
    mixed = reward_pulls(kind, 0.5, (), (ROUND[0], failed(outcome), *ROUND[1:]))
    assert (mixed[0], *mixed[2:]) == alone
    assert (mixed[1].quality, mixed[1].reward) == (0.0, -1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_that_nobody_finished(kind: str) -> None:
    rewarded = reward_pulls(kind, 0.5, ROUND, (failed(round=2), failed(OUT_OF_MEMORY, round=2)))
    assert [(one.quality, one.reward) for one in rewarded] == [(0.0, -1.0)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_without_any_change(kind: str) -> None:
    """No gain, no norm, no time: nothing is divided by zero."""
    rewarded = reward_pulls(kind, 0.0, (), (pull(0.0), pull(0.0)))
    assert [(one.quality, one.reward) for one in rewarded] == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_bounds(kind: str) -> None:
    """The best and the worst there can be, also past the target by half a channel."""
    best, worst = pull(1.0, 1.0, (0.0, 0.52), 1.0), pull(99.0, -1.0, (0.5, 0.5), 0.0)
    first, second = reward_pulls(kind, 0.5, (), (best, worst))
    assert first.quality == pytest.approx(1.0)
    assert second.quality == pytest.approx(-0.3 / 1.3)
    assert -1.0 <= second.reward < first.reward <= 1.0
    unchanged = replace(first, quality=best.quality, reward=best.reward)
    assert unchanged == best
