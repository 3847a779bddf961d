"""Cells that run, a study that is killed, and the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedspine.cli import main
from fedspine.errors import CheckpointError
from fedspine.study.design import load_study
from fedspine.study.report import FILES, report_study
from fedspine.study.retrieve import similarities, vote
from fedspine.study.run import plan_study, results, run_study
from fedspine.study.tasks import personal_task
from tests.small_run import write_data, write_model
from tests.study.test_design import DEVICE

STUDY = """
device = "{folder}/board.toml"
seeds = 2
users = 3
test_examples = 10
evaluations = 2
target = 0.6
encoder = "{folder}/model"
[fixed]
task = "reviews"
model = "{folder}/model"
max_length = 12
batch_size = 4
local_iterations = 2
probe_examples = 4
rank = 4
examples = 8
[vary]
{vary}
[tasks.reviews]
data = "{folder}/data"
partition = "column:writer"
"""


def write_study(folder: Path, vary: str) -> Path:
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_data(folder / "data")
        (folder / "board.toml").write_text(DEVICE.format(8))
    path = folder / "study.toml"
    path.write_text(STUDY.format(folder=folder.as_posix(), vary=vary))
    return path


def test_every_learner_scope_and_compression_runs_and_costs_what_was_planned(tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        'learner = ["none", "rag", "lora", "rag+lora"]\nscope = ["local", "federated", "federated-then-local"]\n'
        'compression = ["none", "bf16", "width:0.3", "fedspine:0.3"]\nbudget = [8]',
    )
    path.write_text(path.read_text().replace("seeds = 2", "seeds = 1"))
    directory = run_study(path, tmp_path / "out")
    plans = {plan.cell.name: plan for plan in plan_study(load_study(path)) if not plan.estimate.infeasible}
    found = {result["name"]: result for result in results(directory)}
    assert set(found) == set(plans)
    assert not list((directory / "work").glob("*"))
    for name, result in found.items():
        levels, estimate, last = result["levels"], plans[name].estimate, result["trace"][-1]
        assert [len(user) for user in result["scores"]] == [10, 10, 10]
        assert result["value"] == pytest.approx(np.mean(result["scores"]))
        assert last["steps"] == estimate.steps
        if levels["compression"] in ("none", "bf16", None):
            assert last["device_seconds"] == pytest.approx(estimate.seconds, rel=0.02), levels
            assert last["upload_bytes"] == pytest.approx(estimate.upload_bytes), levels
            assert last["download_bytes"] == pytest.approx(estimate.download_bytes), levels
        assert len(result["trace"]) == (1 if "lora" not in levels["learner"] else len(result["trace"]))


def test_a_killed_study_goes_on_and_reports_the_same(tmp_path: Path) -> None:
    path = write_study(tmp_path, 'learner = ["rag", "lora"]\nbudget = [2, 3, 4]\ncompression = ["none", "width:0.3"]')
    whole = report_study(path, run_study(path, tmp_path / "whole"))
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "fedspine", "study", "run", str(path), "--out", str(killed), "--json"]
    with subprocess.Popen(command) as process:
        while process.poll() is None and not list(killed.glob("cells/*.json")):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert 0 < len(list(killed.glob("cells/*.json"))) < len(list(whole.glob("cells/*.json")))
    report_study(path, killed)  # of what there is
    assert (killed / "report.md").read_bytes() != (whole / "report.md").read_bytes()
    calls: list[tuple[int, int]] = []
    run_study(path, killed, on_progress=lambda done, of: calls.append((done, of)))
    report_study(path, killed)
    assert calls[-1] == (14, 14)
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    report = json.loads((killed / "report.json").read_text())
    assert report["finished"] == report["planned"] == 14
    assert {each["verdict"] for each in report["guidelines"]} == {"cannot tell"}  # two seeds
    assert all(0 <= cell["reached"] <= 2 and cell["seconds_to_target"] >= 0 for cell in report["cells"])
    page = (killed / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page


@pytest.mark.runtime
def test_processes_share_the_cells(tmp_path: Path) -> None:
    path = write_study(tmp_path, 'learner = ["rag", "none"]')
    alone, together = run_study(path, tmp_path / "alone"), run_study(path, tmp_path / "together", parallel=2)
    assert list(results(alone)) == list(results(together))


def test_a_directory_of_another_study_is_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path, 'learner = ["rag"]')
    directory = tmp_path / "out"
    with pytest.raises(CheckpointError, match="holds no study"):
        report_study(path, directory)
    run_study(path, directory)
    path.write_text(path.read_text().replace("users = 3", "users = 2"))
    with pytest.raises(CheckpointError, match="the study there has users = 3, now it would be 2"):
        run_study(path, directory)
    with pytest.raises(CheckpointError, match="holds something else"):
        run_study(path, tmp_path / "model")


def test_held_out_rows_are_never_in_the_history_and_more_examples_are_the_same_and_others(tmp_path: Path) -> None:
    task = personal_task("reviews", load_study(write_study(tmp_path, "rank = [4]")).tasks, 3, 0)
    few, tests = task.data(8, 10)
    many, _ = task.data(16, 10)
    for user, rows in enumerate(tests):
        pool = task.pools[user]
        assert list(few.test.labels[rows]) == list(task.frame["label"].iloc[pool[:10]])
        texts = [data.train.texts.take(data.owned[user]) for data in (few, many)]
        assert texts[0] == texts[1][:8] == task.frame["text"].iloc[pool[10:18]].tolist()


def test_nearest_items_vote_by_how_near_they_are(tmp_path: Path) -> None:
    similar = np.array([[0.9, 0.5, 0.9, 0.1], [0.0, 0.0, 0.0, 0.0]])
    weight = np.exp(10 * (0.5 / 0.9 - 1))
    shares = vote(similar, np.array([1, 0, 2, 0]), 3, 3)
    assert shares[0] == pytest.approx(np.array([weight, 1, 1]) / (2 + weight))
    assert shares[1] == pytest.approx([1 / 3, 1 / 3, 1 / 3])  # nothing in common: the earliest three, alike
    write_study(tmp_path, "rank = [4]")
    cosines = similarities("dense", ["a good film"], ["cold room", "a good film", "dull"], str(tmp_path / "model"))
    assert cosines[0, 1] == pytest.approx(1.0, abs=1e-6)
    assert cosines[0].argmax() == 1


def test_bm25_finds_the_item_with_the_rare_word() -> None:
    pytest.importorskip("bm25s", reason="needs the extra 'rag'")
    scores = similarities("bm25", ["where is tikora", "nothing known"], ["file a", "file tikora", "file b"], "")
    assert scores[0].argmax() == 1
    assert scores[0, 1] > 0
    assert not scores[1].any()


def test_perturbed_cells_are_held_against_their_twins(tmp_path: Path) -> None:
    levels = '["none", "dropout:0.4", "slowdown:0.4x4", "link:0.25", "memory:0.5"]'
    path = write_study(tmp_path, f'scope = ["local", "federated"]\nbudget = [8]\nperturbation = {levels}')
    path.write_text(path.read_text().replace("seeds = 2", "seeds = 1"))
    study = load_study(path)
    plans = {(p.cell.levels["scope"], p.cell.levels["perturbation"]): p.estimate for p in plan_study(study)}
    assert len(plans) == 8  # nobody drops out at home, and there is no link
    need = 1.25 * plans["federated", "none"].memory_bytes / 1e6
    (tmp_path / "board.toml").write_text(DEVICE.format(need + 0.001))
    (reason,) = {plan.estimate.infeasible for plan in plan_study(study) if plan.cell.levels["scope"] == "federated"}
    assert "in a federation it counts as" in reason  # by the coarser formula of the virtual devices
    (tmp_path / "board.toml").write_text(DEVICE.format(2 * need - 0.001))
    plans = {(p.cell.levels["scope"], p.cell.levels["perturbation"]): p.estimate for p in plan_study(study)}
    assert [plans["federated", level].steps for level in ("none", "slowdown:0.4x4", "memory:0.5")] == [8, 8, 4]
    report = json.loads((report_study(path, run_study(path, tmp_path / "out")) / "report.json").read_text())
    found = {(r["levels"]["scope"], r["levels"]["perturbation"]): r for r in report["robustness"]}
    assert len(found) == 6
    for (scope, level), row in found.items():
        estimate, clean = plans[scope, level], plans[scope, "none"]
        assert row["seconds"]["mean"] == pytest.approx(estimate.seconds / clean.seconds - 1, rel=0.05), (scope, level)
        assert row["value"]["seeds"] == row["seconds"]["seeds"] == 1
        assert row["value"]["low"] <= row["value"]["mean"] <= row["value"]["high"]
    assert found["local", "slowdown:0.4x4"]["value"]["mean"] == 0.0
    assert found["local", "slowdown:0.4x4"]["seconds"]["mean"] == pytest.approx(3.0)
    assert found["local", "slowdown:0.4x4"]["bytes"] is None  # nothing was sent by either
    assert found["federated", "link:0.25"]["value"]["mean"] == 0.0
    assert found["federated", "dropout:0.4"]["bytes"]["mean"] < 0
    assert "Robustness" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "examples = 8",
            "examples = 0",
            "none of the 2 cells can run; the first: examples = 0: retrieval from an empty",
        ),
        ("target = 0.6", 'metric = "mae"', "metric = 'mae' needs classes that are numbers, and task 'reviews' has bad"),
        ('["rag"]', '["rags"]', "learner: 'rags' must be one of none, rag, lora"),
        ("column:writer", "column:user", "partition = 'column:user': no such column in the data"),
        (
            "rank = 4",
            'perturbation = "dropout:2"',
            "perturbation = 'dropout:2': SHARE and SCALE must be numbers above 0",
        ),
    ],
)
def test_a_mistake_ends_with_code_2_before_anything_is_written(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, 'learner = ["rag"]')
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert main(["study", "run", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
