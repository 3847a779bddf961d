"""Whole runs of `fedspine.simulate`: what they leave, which values run, and what a result may depend on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedspine.checkpoint import FILE, load_state
from fedspine.config import METHODS, RunConfig, load_config
from fedspine.devices.clock import VirtualMeter, device_state
from fedspine.errors import CheckpointError, ConfigError, FederationError
from fedspine.report.observer import RunPlan
from fedspine.simulation import RunResult, fastest_engine, simulate
from fedspine.structure import Structure
from fedspine.types import OUT_OF_MEMORY, TRAINED, RoundRecord
from fedspine.workbench import workbench
from tests.small_run import KEYS, figures, rounds, write_data, write_model

SUMMARY = {
    *("method", "policy", "seed", "devices", "rounds", "workers", "final_accuracy", "smoothed_accuracy"),
    *("device_accuracy_mean", "device_accuracy_sd", "device_accuracy_min", "sparsity_prunable", "sparsity_total"),
    *("virtual_seconds", "time_to_target_seconds", "mean_waiting_seconds", "uploaded_bytes", "downloaded_bytes"),
    *("wall_seconds", "startup_seconds", "local_compute_seconds", "peak_rss_bytes"),
}
NETWORK = "download_mbps = [20, 5]\nupload_mbps = [10, 2]\n"
BOARDS = '[[types]]\nname = "board"\ncount = 6\ngflops = 500\nmemory_mb = 1000\n'
WATCHES = '[[types]]\nname = "watch"\ncount = 2\ngflops = 5\nmemory_mb = 0.01\n'

Folders = dict[str, str]


class Listener:
    """Writes down what an observer is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def plan(self, plan: RunPlan) -> None:
        self.heard.append("plan")

    def round_started(self, round: int, devices: Sequence[int]) -> None:
        self.heard.append(f"start {round}")

    def device_done(self, round: int, device: int, outcome: str) -> None:
        self.heard.append(f"device {round} {outcome}")

    def round_done(self, record: RoundRecord) -> None:
        self.heard.append(f"done {record.round}")

    def evaluating(self, done: int, total: int) -> None:
        self.heard.append(f"evaluating {done}/{total}")

    def warning(self, text: str) -> None: ...

    def finished(self, summary: Mapping[str, Any], directory: Path) -> None:
        self.heard.append("finished")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The keys `model` and `data`."""
    base = tmp_path_factory.mktemp("parts")
    return {"model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}


@pytest.fixture(scope="module")
def listener() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def finished(folders: Folders, listener: Listener, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One finished run that many tests read."""
    return simulate(out=tmp_path_factory.mktemp("finished") / "run", observer=listener, **KEYS, **folders)


def assert_same_end(directory: Path, other: Path) -> None:
    """Equal records, figures and checkpoints, bit for bit."""
    assert rounds(directory) == rounds(other)
    assert figures(directory) == figures(other)
    mine, theirs = load_file(directory / FILE), load_file(other / FILE)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def structures(directory: Path) -> list[Structure]:
    """By device."""
    config = load_config(directory / "config.toml", {})
    shape = workbench(config.to_json()).shape
    state = load_state(directory, config, shape)
    return [state.structures.get(device, Structure.full(shape)) for device in range(config.devices)]


def sparsities(directory: Path) -> list[float]:
    shape = workbench(load_config(directory / "config.toml", {}).to_json()).shape
    return [structure.sparsity(shape) for structure in structures(directory)]


def channel_share(directory: Path) -> float:
    """What one FFN channel in every layer is of the prunable parameters: the unit of a cut."""
    shape = workbench(load_config(directory / "config.toml", {}).to_json()).shape
    return shape.layers * shape.channel_parameters / shape.prunable_parameters


def test_run_directory_holds_every_file(finished: RunResult) -> None:
    directory = finished.directory
    names = {"config.toml", "rounds.jsonl", "summary.json", "tensorboard", "checkpoint", "curves.png"}
    assert {path.name for path in directory.iterdir()} == names
    assert [path.name for path in (directory / "checkpoint").iterdir()] == [Path(FILE).name]
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [line["round"] for line in rounds(directory)] == [1, 2, 3, 4, 5, 6]
    assert len(finished.records) == KEYS["rounds"]


def test_summary_holds_the_figures_of_the_records(finished: RunResult) -> None:
    summary = json.loads((finished.directory / "summary.json").read_text(encoding="utf-8"))
    assert summary == finished.summary
    assert summary.keys() >= SUMMARY
    records = finished.records
    assert (summary["method"], summary["policy"], summary["seed"]) == ("fedspine", "fedspine", 0)
    assert (summary["devices"], summary["rounds"], summary["workers"]) == (8, 6, 1)
    assert summary["virtual_seconds"] == records[-1].clock_seconds
    assert summary["virtual_seconds"] == pytest.approx(sum(record.round_seconds for record in records))
    assert summary["uploaded_bytes"] == sum(record.uploaded_bytes for record in records) > 0
    assert summary["downloaded_bytes"] == sum(record.downloaded_bytes for record in records) > 0
    assert summary["smoothed_accuracy"] == records[-1].smoothed_accuracy
    assert summary["sparsity_prunable"] == pytest.approx(float(np.mean(sparsities(finished.directory))))
    assert 0 < summary["sparsity_total"] < summary["sparsity_prunable"]
    assert 0 <= summary["device_accuracy_min"] <= summary["device_accuracy_mean"] <= 1
    assert summary["time_to_target_seconds"] is None
    assert summary["mean_waiting_seconds"] > 0
    for key in ("wall_seconds", "startup_seconds", "local_compute_seconds", "peak_rss_bytes"):
        assert summary[key] > 0


def test_only_the_rounds_to_evaluate_are_evaluated(finished: RunResult) -> None:
    evaluated = [record.round for record in finished.records if record.accuracy is not None]
    assert evaluated == [1, 2, 4, 6]
    points = EventAccumulator(str(finished.directory / "tensorboard")).Reload()
    assert [point.step for point in points.Scalars("accuracy/smoothed")] == evaluated
    assert [point.step for point in points.Scalars("virtual/clock_seconds")] == [1, 2, 3, 4, 5, 6]


def test_observer_hears_everything_in_order(finished: RunResult, listener: Listener) -> None:
    heard = list(listener.heard)
    expected = ["plan"]
    for round in range(1, 7):
        expected += [f"start {round}", *[f"device {round} {TRAINED}"] * KEYS["sampled"], f"done {round}"]
    different = len(set(structures(finished.directory)))
    expected += [f"evaluating {done}/{different}" for done in range(1, different + 1)]
    assert heard == [*expected, "finished"]


@pytest.mark.parametrize("target", [0.25, 0.4, 0.5])
def test_every_device_ends_within_a_channel_of_the_target(folders: Folders, tmp_path: Path, target: float) -> None:
    """Those too that took part seldom or never, whatever ratios they passed on the way."""
    run = simulate(out=tmp_path / "run", **{**KEYS, **folders, "target_sparsity": target, "sampled": 2})
    assert len({pull.device for record in run.records for pull in record.pulls}) < KEYS["devices"]
    np.testing.assert_allclose(sparsities(run.directory), target, rtol=0, atol=channel_share(run.directory))
    assert run.summary["sparsity_prunable_min"] == min(sparsities(run.directory))


def test_only_so_many_devices_are_evaluated(finished: RunResult, folders: Folders, tmp_path: Path) -> None:
    """All are cut to the target; the figures of accuracy are those of the drawn ones."""
    run = simulate(out=tmp_path / "run", **{**KEYS, **folders, "eval_devices": 3})
    assert (finished.summary["devices_evaluated"], run.summary["devices_evaluated"]) == (8, 3)
    assert rounds(run.directory) == rounds(finished.directory)
    assert sparsities(run.directory) == sparsities(finished.directory)
    lowest, highest = finished.summary["device_accuracy_min"], run.summary["device_accuracy_min"]
    assert lowest <= highest


def test_nothing_a_device_lost_comes_back(finished: RunResult) -> None:
    """The ratio of a device never falls, and stays within what the round allows."""
    now = dict.fromkeys(range(KEYS["devices"]), 0.0)
    for record in finished.records:
        for pull in record.pulls:
            assert pull.ratio_before == pytest.approx(now[pull.device])
            assert pull.ratio_after >= pull.ratio_before - 1e-12
            assert pull.ratio_after >= record.floor_ratio - channel_share(finished.directory)
            now[pull.device] = pull.ratio_after


def test_config_toml_repeats_the_run(finished: RunResult, tmp_path: Path) -> None:
    again = simulate(finished.directory / "config.toml", out=tmp_path / "again")
    assert_same_end(again.directory, finished.directory)
    assert (again.directory / "config.toml").read_bytes() == (finished.directory / "config.toml").read_bytes()


def test_same_seed_same_records(finished: RunResult, folders: Folders, tmp_path: Path) -> None:
    """Also after another run in the same process."""
    other = simulate(out=tmp_path / "other", **{**KEYS, **folders, "seed": 1})
    again = simulate(out=tmp_path / "again", **KEYS, **folders)
    assert_same_end(again.directory, finished.directory)
    assert rounds(other.directory) != rounds(finished.directory)
    assert other.summary["virtual_seconds"] != finished.summary["virtual_seconds"]


def test_two_runs_of_one_configuration_in_a_row_are_equal(folders: Folders, tmp_path: Path) -> None:
    """What stays in the process between runs must not be seen in the second."""
    first, second = (simulate(out=tmp_path / name, **{**KEYS, **folders, "rounds": 2}) for name in ("1", "2"))
    assert_same_end(first.directory, second.directory)


def test_rewritten_data_are_read_again(folders: Folders, tmp_path: Path) -> None:
    """A notebook's user corrects the file and runs the cell again."""
    data = write_data(tmp_path / "data")
    keys = {**KEYS, **folders, "data": str(data), "rounds": 1}
    first = simulate(out=tmp_path / "first", **keys)
    path = write_data(tmp_path / "longer", train=160) / "train.tsv"
    path.replace(data / "train.tsv")
    second = simulate(out=tmp_path / "second", **keys)
    examples = [sum(pull.report.examples for pull in run.records[0].pulls) for run in (first, second)]
    assert examples == [60, 80]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(folders: Folders, tmp_path: Path, method: str) -> None:
    small = {key: value for key, value in KEYS.items() if key != "target_sparsity" and key not in METHODS[method]}
    run = simulate(**folders, **small, method=method, out=tmp_path)
    assert run.summary["method"] == method
    target = RunConfig.from_values({"method": method}).target_sparsity
    np.testing.assert_allclose(sparsities(run.directory), target, rtol=0, atol=channel_share(run.directory))
    config = load_config(run.directory / "config.toml", {})
    assert {key: getattr(config, key) for key in METHODS[method]} == METHODS[method]


VALUES = {
    **{
        field.name: field.metadata["key"].choices
        for field in fields(RunConfig)
        if field.name in ("policy", "importance", "masks", "aggregation", "schedule", "reward", "dtype")
    },
    "partition": ("auto", "iid", "dirichlet", "shards", "column:writer"),
    "prune_interval": (1, 2, 4),
}


def mixture(index: int) -> dict[str, Any]:
    """The index-th value of every key, cyclically: a few runs try all of them."""
    return {key: values[index % len(values)] for key, values in VALUES.items()}


@pytest.mark.parametrize(
    "index",
    range(max(map(len, VALUES.values()))),
    ids=lambda index: "-".join(str(value) for value in mixture(index).values()),
)
def test_every_value_runs(folders: Folders, tmp_path: Path, index: int) -> None:
    chosen = mixture(index)
    run = simulate(out=tmp_path, **{**KEYS, **folders, **chosen, "rounds": 4, "min_classes": 1, "dirichlet_alpha": 50})
    config = load_config(run.directory / "config.toml", {})
    assert {key: getattr(config, key) for key in chosen} == chosen
    assert {pull.report.outcome for record in run.records for pull in record.pulls} == {TRAINED}
    np.testing.assert_allclose(sparsities(run.directory), 0.4, rtol=0, atol=channel_share(run.directory))


@pytest.mark.runtime
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_equals_inline(finished: RunResult, folders: Folders, tmp_path: Path, workers: int) -> None:
    run = simulate(out=tmp_path / "run", engine="ray", workers=workers, **KEYS, **folders)
    assert_same_end(run.directory, finished.directory)
    assert (run.summary["engine"], run.summary["workers"]) == ("ray", workers)


@pytest.mark.parametrize(
    ("keys", "workers", "engine"),
    [
        ({}, 1, "inline"),
        ({}, 2, "ray"),
        ({"dtype": "bfloat16"}, 2, "grouped"),
        ({"dtype": "bfloat16", "importance": "magnitude"}, 2, "ray"),
        ({"torch_device": "cuda"}, 1, "grouped"),
    ],
)
def test_auto_is_an_engine_that_the_configuration_decides(keys: dict[str, str], workers: int, engine: str) -> None:
    assert fastest_engine(RunConfig.from_values(keys), workers) == engine


def test_a_device_out_of_memory_is_an_outcome(folders: Folders, tmp_path: Path) -> None:
    """The run goes on; devices that never fit are cut to the target all the same."""
    population = tmp_path / "population.toml"
    population.write_text(NETWORK + BOARDS + WATCHES, encoding="utf-8")
    run = simulate(out=tmp_path / "run", population=str(population), **KEYS, **folders)
    outcomes = {(p.device, p.report.outcome, p.report.message) for record in run.records for p in record.pulls}
    lost = {device: message for device, outcome, message in outcomes if outcome == OUT_OF_MEMORY}
    assert len(lost) == 2
    assert all("MB of 0 MB" in message for message in lost.values())
    assert not lost.keys() & {device for device, outcome, _ in outcomes if outcome == TRAINED}
    assert run.summary["out_of_memory"] == sum(
        pull.report.outcome == OUT_OF_MEMORY for record in run.records for pull in record.pulls
    )
    shares = sparsities(run.directory)
    np.testing.assert_allclose([shares[device] for device in lost], 0.4, rtol=0, atol=channel_share(run.directory))


@pytest.mark.parametrize(("rows", "share"), [(0, 1.0), (1, 0.25)])
def test_a_probe_costs_the_rows_that_it_times(folders: Folders, tmp_path: Path, rows: int, share: float) -> None:
    keys = {**KEYS, **folders, "rounds": 1, "warmup_ratio": 0.0, "timed_examples": rows}
    (record,) = simulate(out=tmp_path / "run", **keys).records
    bench = workbench(load_config(tmp_path / "run/config.toml", {}).to_json())
    flops = share * bench.workload.iteration_flops(Structure.full(bench.shape).counts(), bench.config.fixed_rank)
    for pull in record.pulls:
        assert pull.probe == VirtualMeter(device_state(bench.population, 0, pull.device, 1)).probe(flops)


def test_too_few_devices_stop_the_run_with_the_quorum(folders: Folders, tmp_path: Path) -> None:
    population = tmp_path / "population.toml"
    population.write_text(NETWORK + WATCHES, encoding="utf-8")
    expected = (
        r"round 1: 0 of 4 devices finished, quorum = 0\.75 needs 3; "
        r"the first said: out_of_memory: needs \S+ MB of \S+ MB"
    )
    keys = {**KEYS, **folders, "population": str(population), "quorum": 0.75}
    with pytest.raises(FederationError, match=expected):
        simulate(out=tmp_path / "run", **keys)
    assert not (tmp_path / "run" / "summary.json").exists()


MISTAKES: list[dict[str, Any]] = [
    {"engine": "spark"},
    {"workers": 0},
    {"workers": 0, "engine": "ray"},
    {"roundz": 3},
    {"rounds": "many"},
    {"partition": "alphabetical"},
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_named_before_anything_is_written(
    folders: Folders, tmp_path: Path, mistake: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        simulate(out=tmp_path / "run", **{**KEYS, **folders, **mistake})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "occupy", [lambda path: path.write_text("mine"), lambda path: (path / "sub").mkdir(parents=True)]
)
def test_a_directory_in_use_is_left_alone(folders: Folders, tmp_path: Path, occupy: Callable[[Path], object]) -> None:
    occupy(tmp_path / "run")
    with pytest.raises(CheckpointError, match="already in use; choose another directory, or --resume"):
        simulate(out=tmp_path / "run", **KEYS, **folders)
    assert len(list(tmp_path.rglob("*"))) == (1 if (tmp_path / "run").is_file() else 2)


def test_keys_override_a_configuration(folders: Folders, tmp_path: Path) -> None:
    config = RunConfig.from_values({**KEYS, **folders, "rounds": 2})
    run = simulate(config, out=tmp_path, rounds=1)
    assert len(run.records) == 1
    assert load_config(tmp_path / "config.toml", {}) == replace(config, rounds=1)
