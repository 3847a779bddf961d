"""Runs under another population's clock: those of a new run, and nothing where times were looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedspine.comparison import compare
from fedspine.config import RunConfig, load_config
from fedspine.retime import retime_run
from fedspine.simulation import simulate
from tests.small_run import KEYS, figures, rounds, write_data, write_model

SLOW = "jetson-80-communication-bound"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    where = tmp_path_factory.mktemp("retime")
    folders = {"model": str(write_model(where / "model")), "data": str(write_data(where / "data"))}
    return {**KEYS, "rounds": 3, "eval_every": 1, **folders}


def numbers(value: Any) -> Any:
    """Nested parts as they are, floats up to rounding."""
    if isinstance(value, dict):
        return {key: numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [numbers(each) for each in value]
    return pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value


@pytest.mark.parametrize("policy", ["fixed", "random"])
def test_equal_to_a_new_run(tmp_path: Path, shared: dict[str, Any], policy: str) -> None:
    keys = {**shared, "policy": policy, "target_accuracy": 0.3}
    simulate(out=tmp_path / "old", **keys)
    simulate(out=tmp_path / "new", population=SLOW, **keys)
    config = load_config(tmp_path / "new/config.toml", {})
    assert retime_run(tmp_path / "old", config, tmp_path / "retimed")
    assert load_config(tmp_path / "retimed/config.toml", {}) == config
    assert rounds(tmp_path / "retimed") == numbers(rounds(tmp_path / "new"))
    assert rounds(tmp_path / "retimed") != numbers(rounds(tmp_path / "old"))
    found = figures(tmp_path / "retimed")
    assert found.pop("trained_on_population") == "jetson-80"
    assert found == numbers(figures(tmp_path / "new"))


def test_what_looks_at_times_is_trained(tmp_path: Path, shared: dict[str, Any]) -> None:
    compare(methods=["fedavg", "fedspine"], seeds=1, out=tmp_path / "old", **shared)
    compare(methods=["fedavg", "fedspine"], seeds=1, out=tmp_path / "new", retime=tmp_path / "old", population=SLOW,
            **shared)  # fmt: skip
    runs = {run["method"]: run for run in json.loads((tmp_path / "new/comparison.json").read_text())["runs"]}
    assert runs["fedavg"]["summary"]["trained_on_population"] == "jetson-80"
    assert "trained_on_population" not in runs["fedspine"]["summary"]
    assert not (tmp_path / "new/runs/fedavg-seed0/checkpoint").exists()
    assert (tmp_path / "new/runs/fedspine-seed0/checkpoint").exists()


def test_other_runs_are_left_alone(tmp_path: Path, shared: dict[str, Any]) -> None:
    done = simulate(out=tmp_path / "old", policy="fixed", **shared)
    config = load_config(done.directory / "config.toml", {})
    other = RunConfig.from_values({**shared, "policy": "fixed", "learning_rate": 2e-3})
    assert not retime_run(tmp_path / "old", other, tmp_path / "new")
    for lever in ({"sampling": "speed"}, {"local_work": "deadline"}, {"close_at": 0.5}):
        assert not retime_run(
            done.directory, RunConfig.from_values({**shared, "policy": "fixed", **lever}), tmp_path / "new"
        )
    small = tmp_path / "small.toml"
    small.write_text(
        'download_mbps = [10]\nupload_mbps = [5]\n[[types]]\nname = "tiny"\ncount = 1\ngflops = 10\nmemory_mb = 0.001\n'
    )
    little = RunConfig.from_values({**shared, "policy": "fixed", "population": str(small)})
    assert not retime_run(tmp_path / "old", little, tmp_path / "new")
    (done.directory / "summary.json").unlink()
    assert not retime_run(done.directory, config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
