"""What goes wrong on devices: parsed, drawn by seed, and felt by a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import fedspine
from fedspine.config import RunConfig
from fedspine.config_rules import check_deployable
from fedspine.devices.clock import DeviceState, device_state
from fedspine.devices.population import population_of
from fedspine.errors import ConfigError
from fedspine.perturbation import UNPERTURBED, Perturbation, parse_perturbation
from fedspine.types import FAILED, TRAINED, RoundRecord
from tests.small_run import KEYS, write_data, write_model

SETTINGS = RunConfig(devices=20, sampled=5, rounds=10)


def states(perturbation: str, round: int = 1) -> list[DeviceState]:
    population = population_of(replace(SETTINGS, perturbation=perturbation))
    return [device_state(population, 3, device, round) for device in range(20)]


def test_kinds_are_parsed() -> None:
    assert parse_perturbation("none") == UNPERTURBED
    assert parse_perturbation("slowdown:0.2x4") == Perturbation("slowdown", 0.2, 4.0)
    assert parse_perturbation("link:0.25").of("link") == 0.25
    assert parse_perturbation("link:0.25").of("memory") == 1.0


@pytest.mark.parametrize(
    "text",
    ["dropout", "dropout:1", "dropout:0.3x2", "slowdown:0.2", "slowdown:0.2x1", "link:0", "memory:nan", "rain:1"],
)
def test_what_is_no_perturbation_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"perturbation = '{text}'"):
        RunConfig(perturbation=text)


def test_each_changes_what_it_says_and_nothing_else() -> None:
    clean = states("none")
    slow = states("slowdown:0.2x4")
    hit = [device for device in range(20) if slow[device] != clean[device]]
    assert len(hit) == 4
    assert all(slow[device] == replace(clean[device], jitter=4 * clean[device].jitter) for device in hit)
    again = states("slowdown:0.2x4", 2)
    assert [d for d, state in enumerate(states("none", 2)) if state != again[d]] == hit
    for link, was in zip(states("link:0.25"), clean, strict=True):
        narrow = (was.download_bytes_per_second / 4, was.upload_bytes_per_second / 4)
        assert link == replace(was, download_bytes_per_second=narrow[0], upload_bytes_per_second=narrow[1])
    assert states("memory:0.5", 5) == states("none", 5)
    halves = [state.memory_bytes / was.memory_bytes for state, was in zip(states("memory:0.5", 6), clean, strict=True)]
    assert halves == [0.5] * 20
    away = [{d for d, state in enumerate(states("dropout:0.3", round)) if state.away} for round in (1, 2)]
    assert [len(each) for each in away] == [6, 6]
    assert away[0] != away[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("perturbed")
    return {"model": str(write_model(folder / "model")), "data": str(write_data(folder / "data"))}


def test_a_run_feels_it(folders: dict[str, str], tmp_path: Path) -> None:
    def records(perturbation: str) -> tuple[RoundRecord, ...]:
        keys = {
            **KEYS,
            **folders,
            "rounds": 2,
            "local_iterations": 2,
            "sampled": 8,
            "method": "fedavg",
            "perturbation": perturbation,
        }
        return fedspine.simulate(out=tmp_path / perturbation.replace(":", ""), **keys).records

    clean, dropped, narrow = records("none"), records("dropout:0.3"), records("link:0.1")
    for record in dropped:
        lost = [pull.report for pull in record.pulls if pull.report.outcome == FAILED]
        assert [report.message for report in lost] == ["dropped out of the round"] * 2
        assert all(report.download_bytes > 0 == report.upload_bytes for report in lost)
    assert sum(r.uploaded_bytes for r in dropped) < sum(r.uploaded_bytes for r in clean)
    assert narrow[0].round_seconds > 2 * clean[0].round_seconds
    assert narrow[0].loss == clean[0].loss


def test_pruning_goes_on_when_devices_drop_out(folders: dict[str, str], tmp_path: Path) -> None:
    keys = {**KEYS, **folders, "sampled": 6, "perturbation": "dropout:0.5", "quorum": 0.0, "masks": "own"}
    run = fedspine.simulate(out=tmp_path / "run", **keys)
    outcomes = {pull.report.outcome for record in run.records for pull in record.pulls}
    assert outcomes == {TRAINED, FAILED}
    assert run.summary["out_of_memory"] == 0
    assert run.summary["sparsity_prunable"] >= 0.95 * KEYS["target_sparsity"]


def test_real_devices_are_not_perturbed() -> None:
    with pytest.raises(ConfigError, match="devices are real here"):
        check_deployable(RunConfig(perturbation="link:0.5"))
