"""`fedspine.calibrate`: the devices of a run as a catalogue, and how well it predicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedspine
from fedspine.calibration import Calibration, calibrated
from fedspine.cli import main
from fedspine.config import RunConfig
from fedspine.devices.clock import device_state
from fedspine.devices.fitting import line, spread
from fedspine.devices.population import load_population
from fedspine.errors import CheckpointError, ConfigError
from fedspine.simulation import RunResult, simulate
from fedspine.types import OUT_OF_MEMORY, TRAINED, Action, Pull, Report, RoundRecord
from tests.small_run import KEYS, write_data, write_model

DEVICES = """
jitter = 0.03
bandwidth_sigma = 0.05
latency_ms = 0
download_mbps = [8]
upload_mbps = [4]
[[types]]
name = "fast"
count = 1
gflops = 2
memory_mb = 1000
iteration_ms = 0
[[types]]
name = "slow"
count = 3
gflops = 0.2
memory_mb = 1000
iteration_ms = 0
download_mbps = 2
upload_mbps = 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Four devices, of which three take part in every round; the policy varies their ranks."""
    base = tmp_path_factory.mktemp("calibration")
    (base / "devices.toml").write_text(DEVICES, encoding="utf-8")
    folders = {"model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}
    keys = {**KEYS, **folders, "devices": 4, "sampled": 3, "rounds": 8, "population": str(base / "devices.toml")}
    return simulate(out=base / "run", **keys)


@pytest.fixture(scope="module")
def twin(run: RunResult) -> Calibration:
    return fedspine.calibrate(run.directory, run.directory.parent / "twin.toml")


def test_the_clock_of_a_virtual_run_is_recovered(run: RunResult, twin: Calibration) -> None:
    truth = load_population(twin.config.population, 4, twin.config.seed)
    assert [kind.count for kind in twin.types] == [1, 1, 1, 1]
    for device, kind in enumerate(twin.types):
        state = device_state(truth, twin.config.seed, device, 1)
        # A cut hits whole heads: the FLOPs that the server plans with differ a little from those of the device.
        assert kind.gflops * 1e9 == pytest.approx(state.flops_per_second, rel=0.15)
        assert kind.iteration_ms == pytest.approx(0, abs=1)
    for kind in twin.types:
        slow = kind.gflops < 1
        assert (kind.download_mbps, kind.upload_mbps) == pytest.approx((2, 1) if slow else (8, 4), rel=0.1)
        assert kind.memory_mb > 0
    assert twin.median_error is not None
    assert twin.median_error < 0.15


def test_a_simulation_runs_on_the_twin(run: RunResult, twin: Calibration, tmp_path: Path) -> None:
    file = run.directory.parent / "twin.toml"
    population = load_population(str(file), 4)
    assert (population.types, population.shuffled) == (
        tuple(replace(kind, **vars(back)) for kind, back in zip(twin.types, population.types, strict=True)),
        False,
    )
    for device, kind in enumerate(population.types):
        assert device_state(population, 7, device, 1).type_name == kind.name == f"device {device}"
    again = simulate(twin.config, out=tmp_path / "again", population=str(file))
    was, now = (each.records[-1].clock_seconds for each in (run, again))
    assert now == pytest.approx(was, rel=0.2)
    assert not any(pull.report.outcome == OUT_OF_MEMORY for record in again.records for pull in record.pulls)


def pull(round: int, device: int, seconds: float, flops: float = 1e9, **report: object) -> Pull:
    done = {"compute_seconds": seconds, "download_seconds": 0.5, "upload_seconds": 1.0, "peak_memory_bytes": 5_000_000}
    values = {"download_bytes": 100_000, "upload_bytes": 100_000, "examples": 9, **done, **report}
    return Pull(round, device, Action(0.0, 8), 0.0, 0.0, Report(**{"outcome": TRAINED, **values}), flops)  # type: ignore[arg-type]


def records(*rounds: list[Pull]) -> list[RoundRecord]:
    return [RoundRecord(number, 0.0, tuple(pulls), 1.0, 1.0, 0.0, 0, 0) for number, pulls in enumerate(rounds, start=1)]


def test_few_rounds_lost_ones_and_devices_never_seen() -> None:
    config = RunConfig.from_values({"devices": 7, "sampled": 3})
    out = {"outcome": OUT_OF_MEMORY, "message": "needs 160 MB of 37 MB"}
    lost = {"outcome": "failed", "message": "dropped out of the round", "compute_seconds": 0.0}
    found = calibrated(
        Path("run"),
        config,
        records(
            [pull(1, 0, 2.0), pull(1, 1, 4.0), pull(1, 2, 0.0, **out)],
            [pull(2, 0, 4.0, flops=2e9), pull(2, 1, 400.0), pull(2, 2, 0.0, **lost)],
            [pull(3, 1, 4.0), pull(3, 6, 1.0)],
        ),
    )
    kinds = {kind.name: kind for kind in found.types}
    assert list(kinds) == ["device 0", "device 1", "device 2", "device 3", "device 6"]
    assert [kind.count for kind in found.types] == [1, 1, 1, 3, 1]
    assert found.notes == ("rounds: 2", "rounds: 3", *["never trained: medians of the others"] * 2, "rounds: 1")
    rates = {name: kind.gflops for name, kind in kinds.items()}
    assert rates == pytest.approx(dict(zip(kinds, (0.5, 0.25, 0.5, 0.5, 1.0), strict=True)))  # one outlier of three
    assert [kind.memory_mb for kind in found.types] == [10, 10, 37, 10, 10]
    assert (kinds["device 0"].download_mbps, kinds["device 0"].upload_mbps) == pytest.approx((1.6, 0.8))
    ahead = [(each.round, each.device, each.predicted_seconds, each.measured_seconds) for each in found.predictions]
    assert ahead[0] == pytest.approx((2, 0, 5.5, 5.5))
    assert ahead[1] == pytest.approx((2, 1, 5.5, 401.5))  # of the first round alone
    assert ahead[2] == pytest.approx((3, 1, 1.5 + 202, 5.5))
    assert found.median_error == pytest.approx(1 - 5.5 / 401.5)


def test_a_transfer_that_was_never_timed_is_as_fast_as_the_other_way() -> None:
    config = RunConfig.from_values({"devices": 1, "sampled": 1})
    found = calibrated(Path("run"), config, records([pull(1, 0, 1.0, upload_seconds=0.0)]))
    assert found.types[0].upload_mbps == found.types[0].download_mbps == pytest.approx(1.6)
    assert found.median_error is None


def test_a_fixed_cost_is_fitted_where_it_can_be_told() -> None:
    rng = np.random.default_rng(0)
    amounts = np.linspace(1, 2, 30)
    exact = line(amounts, 0.3 + 2 * amounts)
    assert (exact.intercept, exact.slope) == pytest.approx((0.3, 2))
    noisy = (0.3 + 2 * amounts) * np.exp(0.02 * rng.standard_normal(30))
    noisy[3] = 40.0  # an outlier makes it careful
    assert line(amounts, noisy).intercept == 0
    assert line(amounts, noisy).slope == pytest.approx(2.2, rel=0.03)
    noisy[3] = 2.5
    assert line(amounts, noisy).seconds(1.5) == pytest.approx(3.3, rel=0.02)
    assert line(amounts[:5], 0.3 + 2 * amounts[:5]).intercept == 0  # too few
    assert line(np.ones(30), noisy).intercept == 0  # all alike
    assert spread(0.2 * rng.standard_normal(400)) == pytest.approx(0.2, rel=0.1)


def test_the_command_says_what_it_found_and_what_is_wrong(
    run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "twin.toml"
    assert main(["calibrate", str(run.directory), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "4 of 4 devices trained; a round predicted from the device's rounds before: median error" in said.out
    assert f"fedspine simulate -s population={out} -s devices=4" in said.err
    assert main(["calibrate", str(run.directory), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["devices"]) == [f"device {number}" for number in range(4)]
    with pytest.raises(ConfigError, match="must be a new file in a folder that exists"):
        fedspine.calibrate(run.directory, out)
    with pytest.raises(CheckpointError, match=r"it holds no config\.toml, so it is no directory of a run"):
        fedspine.calibrate(tmp_path)
    (tmp_path / "config.toml").write_text(run.directory.joinpath("config.toml").read_text(), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"it holds no rounds\.jsonl"):
        fedspine.calibrate(tmp_path)
    (tmp_path / "rounds.jsonl").touch()
    with pytest.raises(CheckpointError, match="0 finished rounds, and no device trained"):
        fedspine.calibrate(tmp_path)
    failed = records([pull(1, 0, 1.0, outcome="failed", message="no data")])
    with pytest.raises(CheckpointError, match="1 finished rounds, and no device trained in any of them: failed: no"):
        calibrated(tmp_path, RunConfig(), failed)
