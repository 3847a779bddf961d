"""Local iterations under a common deadline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedspine
from fedspine.client_round import train
from fedspine.config import RunConfig
from fedspine.controller.deadline import fitting_iterations
from fedspine.controller.policy import make_policy
from fedspine.cost import workload_of
from fedspine.lora.adapters import narrow
from fedspine.methods import PLAIN
from fedspine.minilm_shape import minilm_shape
from fedspine.structure import Structure
from fedspine.types import Action, Candidate, Probe, TrainRequest
from fedspine.workbench import workbench
from tests.small_run import KEYS, write_data, write_model
from tests.tiny import random_arrays, random_scores

DEADLINE = RunConfig(local_work="deadline", policy="fixed")
WORKLOAD = workload_of(DEADLINE, minilm_shape(DEADLINE))


def fitting(compute: list[float], transfer: list[float], full: int = 20) -> list[int]:
    return fitting_iterations(np.array(compute), np.array(transfer), full)


def test_all_do_what_fits_into_the_median() -> None:
    assert fitting([8, 10, 12, 14], [0, 0, 0, 0]) == [27, 22, 18, 15]  # 11 s: 27.5, 22, 18.3 and 15.7
    assert fitting([8, 10, 12, 14], [1, 1, 1, 1]) == [27, 22, 18, 15]
    assert fitting([10, 10, 10], [1, 1, 1]) == [20, 20, 20]


def test_the_slowest_does_a_quarter_and_the_others_use_its_time() -> None:
    assert fitting([10, 10, 20, 80], [1, 1, 2, 4]) == [40, 40, 22, 5]  # 4 + 80 / 4 = 24 s
    assert fitting([10, 10, 30, 80], [1, 1, 2, 4]) == [40, 40, 14, 5]
    assert fitting([1, 9, 9], [0, 0, 0], full=1) == [2, 1, 1]


def test_where_links_take_long_all_do_more() -> None:
    assert fitting([1, 1, 1], [3, 3, 3]) == [40, 40, 40]  # no more than twice as many
    assert fitting([4, 4, 4], [5, 5, 5]) == [40, 40, 40]
    assert fitting([8, 8, 8], [4, 4, 4]) == [30, 30, 30]  # three times as long as the transfers
    assert fitting([4, 4], [1, 1]) == [20, 20]


def test_iterations_are_not_given_up_for_little_time() -> None:
    """Compared with the links of the slowest one, they cost nothing."""
    assert fitting([4, 4, 4], [0, 0, 39], full=4) == [8, 8, 8]
    assert fitting([4, 4, 40], [0, 0, 3], full=4) == [8, 8, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_deadline_has_the_most_value_per_second(seed: int) -> None:
    """Against all deadlines on a fine grid."""
    rng = np.random.default_rng(seed)
    compute, transfer = rng.lognormal(0, 1, 9), rng.lognormal(-1, 1, 9)
    times = compute + transfer
    chosen = np.array(fitting_iterations(compute, transfer, 10_000)) / 10_000
    ours = (chosen**0.75).sum() / max(np.max(chosen * compute + transfer), np.median(times))
    grid = np.linspace(max(np.median(times), np.max(compute / 4 + transfer)), (times + compute).max(), 1000)
    shares = np.clip((grid[:, None] - transfer) / compute, 0.25, 2)
    assert ours == pytest.approx(((shares**0.75).sum(1) / grid).max(), rel=0.01)


def test_actions_keep_ratio_and_rank_and_unknown_devices_do_everything() -> None:
    speeds = {0: 1e-12, 1: 1e-12, 2: 3e-12}
    cohort = [
        Candidate(device, 0.1, 0.1, 0.3, (4, 8, 16), Probe(speeds[device], 1e-9, 0, 0) if device in speeds else None)
        for device in range(4)
    ]
    chosen = make_policy(DEADLINE, WORKLOAD).suggest(1, cohort, [], (0, 1))
    plain = make_policy(replace(DEADLINE, local_work="equal"), WORKLOAD).suggest(1, cohort, [], (0, 1))
    assert [replace(action, iterations=0) for action in chosen] == list(plain)
    assert [action.iterations for action in chosen[:2]] == [20, 20]
    assert 5 <= chosen[2].iterations < 8
    assert chosen[3].iterations == 0


def test_a_deadline_is_a_reason_to_probe() -> None:
    assert DEADLINE.uses_probe
    assert not replace(DEADLINE, local_work="equal").uses_probe
    assert not replace(DEADLINE, probe="never").uses_probe


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("parts")
    return {**KEYS, "model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_a_given_number_of_iterations_is_that_local_round(keys: dict[str, Any], iterations: int) -> None:
    """The same arrays, cuts, scores, times and bytes as where the configuration says so many."""
    replies = []
    keys = {**keys, "prune_interval": 2 if iterations <= 4 else 4}  # more of them are cut no more often
    for config, action in (
        (RunConfig.from_values({**keys, "local_iterations": 4}), Action(0.3, 4, iterations)),
        (RunConfig.from_values({**keys, "local_iterations": iterations}), Action(0.3, 4)),
    ):
        bench = workbench(config.to_json())
        full = Structure.full(bench.shape)
        arrays = narrow(random_arrays(bench.resident, 4), full, 4, bench.shape)
        request = TrainRequest(2, 1, action, full, arrays, random_scores(bench.shape), config.to_json())
        replies.append(train(request))
    ours, theirs = replies
    assert replace(ours.report, wall={}) == replace(theirs.report, wall={})
    assert ours.structure == theirs.structure
    for name, array in theirs.arrays.items():
        np.testing.assert_array_equal(ours.arrays[name], array, err_msg=name)


@pytest.mark.parametrize("policy", ["fixed", "fedspine"])
def test_rounds_get_shorter(tmp_path: Path, policy: str) -> None:
    keys = {"policy": policy, "rounds": 40, "population": "jetson-80-compute-bound", **PLAIN}
    equal, deadline = (
        fedspine.schedule(out=tmp_path / work, **{**keys, "local_work": work}).summary for work in ("equal", "deadline")
    )
    assert deadline["virtual_seconds"] < 0.8 * equal["virtual_seconds"]
    assert deadline["mean_waiting_seconds"] < 0.8 * equal["mean_waiting_seconds"]
    assert deadline["progress"] < equal["progress"]
    assert deadline["progress_per_virtual_second"] > equal["progress_per_virtual_second"]
