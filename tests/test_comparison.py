"""Comparisons: the same devices for all methods, finished runs kept, and tables that say what can be told apart."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fedspine import inference
from fedspine.cli import main
from fedspine.comparison import Cell, Progress, compare, plan
from fedspine.errors import CheckpointError, ConfigError, FederationError
from fedspine.report.comparison_figures import draw_comparison
from fedspine.report.comparison_tables import (
    View,
    as_markdown,
    common_target,
    interval,
    paired_difference,
    paired_ratio,
    seconds_to,
)
from fedspine.simulation import simulate
from tests.small_run import KEYS, figures, options, write_data, write_model

METHODS = ["fedavg", "fedspine"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    where = tmp_path_factory.mktemp("comparison")
    folders = {"model": str(write_model(where / "model")), "data": str(write_data(where / "data"))}
    return {**KEYS, "rounds": 2, "eval_every": 1, **folders}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared: dict[str, Any]) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "both"
    compare(methods=METHODS, seeds=2, parallel=2, out=directory, **shared)
    return directory


def test_runs_are_those_of_simulate(tmp_path: Path, finished: Path, shared: dict[str, Any]) -> None:
    simulate(out=tmp_path / "one", seed=1, method="fedavg", **{**shared, "target_sparsity": 0.0})
    assert figures(finished / "runs/fedavg-seed1") == figures(tmp_path / "one")


def test_everything_is_written(finished: Path) -> None:
    runs = json.loads((finished / "comparison.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [(m, seed) for seed in (0, 1) for m in METHODS]
    assert [point["round"] for point in runs[0]["curve"]] == [1, 2]
    assert "| fedspine | 2 | 40 % |" in (finished / "tables.md").read_text()
    assert all((finished / name).stat().st_size > 5_000 for name in ("curves.png", "costs.png"))
    assert not list((finished / "runs").glob("*.toml"))


def test_devices_and_data_are_the_same_for_all(finished: Path) -> None:
    lines = [
        json.loads((finished / f"runs/{method}-seed0/rounds.jsonl").read_text().splitlines()[0]) for method in METHODS
    ]
    assert [pull["device"] for pull in lines[0]["pulls"]] == [pull["device"] for pull in lines[1]["pulls"]]
    assert [p["report"]["examples"] for p in lines[0]["pulls"]] == [p["report"]["examples"] for p in lines[1]["pulls"]]


def test_only_what_is_missing_runs(finished: Path, shared: dict[str, Any]) -> None:
    before = (finished / "comparison.json").read_text()
    path = finished / "runs/fedspine-seed1/summary.json"
    path.unlink()
    seen: list[tuple[str, int]] = []

    def listen(cell: Cell, progress: Progress) -> None:
        if progress.state == "running" and (cell.method, cell.seed) not in seen:
            seen.append((cell.method, cell.seed))

    compare(methods=METHODS, seeds=2, out=finished, on_progress=listen, **shared)
    assert seen == [("fedspine", 1)]
    again, first = (json.loads(text)["runs"] for text in ((finished / "comparison.json").read_text(), before))
    assert [run["curve"] for run in again] == [run["curve"] for run in first]


def test_another_configuration_is_refused(finished: Path, shared: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="fedavg-seed0 there has rounds = 2, now it would be 3"):
        compare(methods=METHODS, seeds=2, out=finished, **{**shared, "rounds": 3})


def test_a_folder_of_something_else_is_refused(tmp_path: Path, shared: dict[str, Any]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else than a comparison"):
        compare(methods=METHODS, out=tmp_path, **shared)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, shared: dict[str, Any]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"--out .*file/x: Not a directory; choose another directory"):
        compare(methods=METHODS, out=tmp_path / "file" / "x", **shared)


def test_a_damaged_summary_is_told(tmp_path: Path, shared: dict[str, Any]) -> None:
    run = tmp_path / "runs" / "fedavg-seed0"
    run.mkdir(parents=True)
    (run / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"summary\.json: damaged .* delete .*fedavg-seed0"):
        compare(methods=["fedavg"], seeds=1, out=tmp_path, **shared)


def test_a_run_that_fails_says_why(tmp_path: Path, shared: dict[str, Any]) -> None:
    with pytest.raises(FederationError, match=r"run fedavg-seed0: data = '.*nowhere': there is no such file or folder"):
        compare(methods=["fedavg"], seeds=1, out=tmp_path / "x", **{**shared, "data": str(tmp_path / "nowhere")})


def test_methods_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'rounds = 4\ntarget_sparsity = 0.6\n[methods.fedavg]\n[methods."One shot"]\nschedule = "one-shot"\n'
        '[methods.faithful]\nmethod = "fedspine-paper"\nmax_step_ratio = 0.3\n'
    )
    cells = plan(path, None, 2, {"rounds": 5})
    assert [cell.name for cell in cells][:3] == ["fedavg-seed0", "one-shot-seed0", "faithful-seed0"]
    fedavg, one_shot, faithful = (cell.config for cell in cells[3:])
    assert {config.seed for config in (fedavg, one_shot, faithful)} == {1}
    assert {config.rounds for config in (fedavg, one_shot, faithful)} == {5}
    assert (fedavg.target_sparsity, one_shot.target_sparsity) == (0.0, 0.6)
    assert (one_shot.method, one_shot.schedule) == ("fedspine", "one-shot")
    assert (faithful.policy, faithful.max_step_ratio) == ("s-ucb", 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[methods.fedavg]\nmethod = ["fedit"]\n', "method = ['fedit']: must be one of"),
        ("[methods.fedavg]\nseed = 3\n", "[methods.fedavg] seed: a comparison sets it itself"),
    ],
)
def test_methods_of_a_file_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        plan(path, None, 1, {})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "keys", "message"),
    [
        (["fedbest"], {}, "'fedbest' is neither a preset"),
        (["fedavg", "fedavg"], {}, "'fedavg' is named twice"),
        (["fedavg"], {"seed": 3}, "use --seeds"),
        (["fedavg"], {"method": "fedspine"}, "use --methods"),
        (["fedavg"], {"round": 3}, "method 'fedavg': unknown key 'round': did you mean 'rounds'?"),
    ],
)
def test_refused(methods: list[str], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(None, methods, 1, keys)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "hetlora"}, "baseline = 'hetlora': must be one of the methods, fedavg"),
        ({"target": 80.0}, "target = 80.0: must be above 0 and at most 1"),
        ({"inference": True, "retime": "."}, "runs of another clock hold no model"),
        ({"retime": "nowhere"}, "--retime nowhere: holds no comparison"),
    ],
)
def test_a_view_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        compare(methods=["fedavg"], out=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path, shared: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "--methods", "fedspine", "--seeds", "1", "--out", str(tmp_path / "out"), *options(shared)]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["method"] == "fedspine"
    assert main(arguments) == 0
    assert "Accuracy; points" in capsys.readouterr().err
    assert main(["compare", "--seeds", "0"]) == 2
    assert "seeds = 0: must be at least 1" in capsys.readouterr().err
    assert main(["compare", "--first-seed", "-1"]) == 2
    assert "first_seed = -1: must be at least 0" in capsys.readouterr().err


def test_seeds_can_be_shared_out() -> None:
    cells = plan(None, ["fedavg", "fedspine"], 2, {}, first_seed=3)
    assert [cell.name for cell in cells] == ["fedavg-seed3", "fedspine-seed3", "fedavg-seed4", "fedspine-seed4"]
    assert cells == [cell for cell in plan(None, ["fedavg", "fedspine"], 5, {}) if cell.seed >= 3]


def run(method: str, seed: int, accuracy: float, speed: float = 1.0) -> dict[str, Any]:
    """A run that reaches `accuracy` on a straight line in 100 / speed seconds."""
    summary = {
        "device_accuracy_mean": accuracy,
        "device_accuracy_min": accuracy - 0.1,
        "smoothed_accuracy": accuracy,
        "sparsity_prunable": 0.5,
        "virtual_seconds": 100 / speed,
        "mean_waiting_seconds": 1.0,
        "uploaded_bytes": 1e6,
        "downloaded_bytes": 2e6,
        "device_memory_bytes": 3e8,
    }
    curve = [
        {"clock_seconds": 100 / speed * part, "floor_ratio": 0.5, "smoothed_accuracy": accuracy * part}
        for part in (0.0, 1.0)
    ]
    return {"method": method, "seed": seed, "summary": summary, "curve": curve}


def test_differences_are_paired() -> None:
    """Seeds that differ by far do not hide a difference that is the same in each of them."""
    slow = [run("slow", seed, 0.6 + 0.1 * seed) for seed in range(3)]
    fast = [run("fast", seed, 0.61 + 0.1 * seed + 0.001 * (seed - 1), speed=2.0) for seed in range(3)]
    assert paired_difference(fast, slow, "device_accuracy_mean") == "+1.0 ± 0.2"
    same = [run("same", seed, 0.6 + 0.1 * seed + 0.01 * (seed - 1)) for seed in range(3)]
    assert paired_difference(same, slow, "device_accuracy_mean").endswith(", not separable")
    assert paired_ratio(fast, slow, lambda r: r["summary"]["virtual_seconds"]).startswith("2.00x (2.00 to 2.00)")
    text = as_markdown([*slow, *fast])
    assert "| fast | 3 | 50 % |" in text
    assert common_target([*slow, *fast]) == 0.6


def test_a_target_that_some_miss(tmp_path: Path) -> None:
    """It is said how many seeds reached it, and what did not is not drawn at 0."""
    good = [run("good", seed, 0.8) for seed in range(2)]
    half = [run("half", seed, 0.7 + 0.1 * seed) for seed in range(2)]
    bad = [run("bad", seed, 0.6) for seed in range(2)]
    runs, view = [*good, *half, *bad], View(target=0.75)
    text = as_markdown(runs, view)
    assert "a smoothed accuracy of 0.750 at the final sparsity; faster" in text
    assert "| bad | not reached | not reached |" in text
    assert "| half | 93.8 (1 of 2 seeds) | 1.00x (1 of 2 seeds) |" in text
    assert "| half | 100 % (1 of 2 seeds) | 100 % |" in text
    assert "| other | not reached | no common seed |" in as_markdown([*good, run("other", 5, 0.6)], view)
    draw_comparison(runs, tmp_path, view)
    assert (tmp_path / "costs.png").stat().st_size > 5_000


def test_the_target_counts_when_a_model_is_cut_as_far_as_it_will_be() -> None:
    """What is reached with less cut is another model's time; after the ramp the next evaluation counts."""
    cut = run("cut", 0, 0.8)
    points = ((10.0, 0.0, 0.79), (20.0, 0.3, 0.80), (40.0, 0.5, 0.70), (60.0, 0.5, 0.80))
    cut["curve"] = [
        dict(zip(("clock_seconds", "floor_ratio", "smoothed_accuracy"), each, strict=True)) for each in points
    ]
    assert seconds_to(cut, 0.75) == 50.0
    assert seconds_to(cut, 0.70) == 40.0
    assert seconds_to(cut, 0.81) is None
    cut["curve"][1]["smoothed_accuracy"] = 0.9
    assert common_target([cut, run("other", 0, 0.9)]) == 0.8
    dense = run("dense", 0, 0.8)
    for point in dense["curve"]:
        point["floor_ratio"] = 0.0
    assert seconds_to(dense, 0.4) == 50.0


def test_relative_cost_is_that_of_the_baseline() -> None:
    slow = [run("slow", seed, 0.8) for seed in range(2)]
    fast = [run("fast", seed, 0.8, speed=2.0) for seed in range(2)]
    ratios = {"latency": [{"batch": 1, "p50": 0.6}, {"batch": 16, "p50": 0.514}], "peak_memory": None}
    lines = as_markdown([*fast, *slow], View(baseline="slow", inference={"fast": ratios})).splitlines()
    assert "## Relative cost, slow = 100 %; inference: measured on the models of the first seed" in lines
    assert "| fast | 50 % | 50 % | 100 % | 100 % | 60 % | 51 % | - |" in lines
    assert "| slow | 100 % | 100 % | 100 % | 100 % | 100 % | 100 % | 100 % |" in lines


def finished_run(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "summary.json").touch()
    return directory


def test_inference_is_measured_once_against_each_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, ...]] = []

    def fedspine(*arguments: object) -> str:
        said.append(tuple(map(str, arguments)))
        if arguments[0] == "export":
            Path(str(arguments[-1])).mkdir(parents=True)
        return '{"ratios": {"peak_memory": 0.5}}'

    monkeypatch.setattr(inference, "_fedspine", fedspine)
    runs = {name: finished_run(tmp_path / f"runs/{name}-seed0") for name in ("fedit", "magnitude")}
    models = tmp_path / "models"
    found = inference.measure_inference(runs, models, "fedit", 32)
    assert found == inference.measure_inference(runs, models, "fedit", 32) == {"magnitude": {"peak_memory": 0.5}}
    assert [each[0] for each in said] == ["export", "export", "bench"]
    model, reference = (str(models / f"{name}-seed0") for name in ("magnitude", "fedit"))
    assert said[2][1:] == (model, "--against", reference, "--length", "32", "--json")
    assert inference.measure_inference(runs, models, "magnitude", 32) == {"fedit": {"peak_memory": 0.5}}
    third = runs | {"apt": finished_run(tmp_path / "runs/apt-seed0")}
    for baseline, benches in (("fedit", 1), ("magnitude", 1), ("apt", 2)):
        said.clear()
        inference.measure_inference(third, models, baseline, 32)
        assert [each[0] for each in said].count("bench") == benches
    said.clear()
    later = time.time() + 10
    os.utime(runs["magnitude"] / "summary.json", (later, later))  # it was run again
    inference.measure_inference(runs, models, "fedit", 32)
    assert [each[0] for each in said] == ["export", "bench"]


def test_intervals_are_those_of_student() -> None:
    assert interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    assert interval([1.0], 2) == "1.00"
