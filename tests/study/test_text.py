"""Studies of language models: metrics by hand, what is asked, learners that find what was planted, and mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedspine.config import RunConfig
from fedspine.errors import ConfigError, FedSpineError
from fedspine.model import load_tokenizer
from fedspine.study.design import Study, load_study
from fedspine.study.language import ask
from fedspine.study.metrics import of_answers, of_tokens, score_of
from fedspine.study.protocols import Budget, slowed
from fedspine.study.recommend import recommend
from fedspine.study.report import report_study
from fedspine.study.run import plan_study, results, run_study
from fedspine.study.tasks import halves, personal_task
from fedspine.study.text_difficulty import measure_text, unigram_loss
from tests.data.test_lamp import films, write
from tests.small_run import BAD, GOOD, OTHER, write_model
from tests.study.test_design import DEVICE
from tests.study.test_protocols import trace

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "../shared/data"
KEYS = """
data = "{data}"
task = "causal-lm"
user_column = "writer"
"""
STUDY = """
device = "{folder}/board.toml"
seeds = 1
users = 2
test_examples = 6
encoder = "{folder}/model"
{head}
[fixed]
task = "texts"
model = "{folder}/model"
max_length = 64
batch_size = 4
local_iterations = 5
learning_rate = 1e-2
rank = 4
examples = 12
budget = 40
generate_tokens = 3
{more}
[tasks.texts]
{keys}
"""


def write_texts(path: Path, responses: bool = False) -> Path:
    """Three writers with 40, 30 and 20 rows: who says `good` goes on with it, in words that are drawn."""
    rng = np.random.default_rng(0)
    lines = []
    for row in range(40):
        for writer, rows in (("a", 40), ("b", 30), ("c", 20)):
            kind = row % 2
            first, second = " ".join(rng.choice(OTHER, 3)), (GOOD, BAD)[kind][row % 5]
            pair = {"instruction": f"{first} {second}", "response": ("good", "bad")[kind]}
            plain = {"text": f"{first} {second} is very {second} and the film is {second}"}
            if row < rows:
                lines.append(json.dumps({**(pair if responses else plain), "writer": writer}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_model(folder / "model", family="llama", language=True, max_position_embeddings=64)
    write_texts(folder / "texts.jsonl")
    write_texts(folder / "pairs.jsonl", responses=True)
    (folder / "board.toml").write_text(DEVICE.format(16))
    return folder


def study_file(folder: Path, to: Path, head: str, more: str, data: str = "texts.jsonl", keys: str = KEYS) -> Path:
    where = folder.as_posix()
    path = to / "study.toml"
    path.write_text(STUDY.format(folder=where, head=head, more=more, keys=keys.format(data=f"{where}/{data}")))
    return path


def values(directory: Path, factor: str = "learner") -> dict[str, float]:
    return {str(result["levels"][factor]): result["value"] for result in results(directory)}


def test_scores_are_those_of_all_tokens_of_a_user() -> None:
    losses, right, tokens = np.array([2.0, 1.0]), np.array([0.0, 2.0]), np.array([1.0, 2.0])
    found = of_tokens("perplexity", losses, right, tokens)
    assert found.mean() == pytest.approx(-1.0)  # three tokens with a loss of three
    assert found.tolist() == pytest.approx([-1 - 1 / 1.5, -1 + 1 / 1.5])
    assert of_tokens("token-accuracy", losses, right, tokens).mean() == pytest.approx(2 / 3)
    even = of_tokens("perplexity", np.array([2.0, 8.0]), right, np.array([1.0, 4.0]))
    assert even.tolist() == [-2.0, -2.0]  # a long row is no outlier
    assert score_of("perplexity", 8.0) == -math.log(8)
    assert score_of("accuracy", 0.8) == 0.8


def test_answers_are_scored_against_the_responses() -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra 'text'")
    pairs = [" the warm room", "good meal", "no"], ["the warm room ", "the good meal", "yes"]
    assert of_answers("exact-match", *pairs).tolist() == [1.0, 0.0, 0.0]
    assert of_answers("rouge-l", *pairs).tolist() == pytest.approx([1.0, 0.8, 0.0])  # 2 of 2 and of 3 words


def test_worse_is_less_where_scores_are_below_zero() -> None:
    curve = trace(-4.0, -2.0)
    assert slowed(curve, Budget(seconds=20), slowdown=2.0) == -1.0
    assert slowed(curve, Budget(seconds=20), slowdown=1.0) == 0.0
    assert slowed(trace(-3.0, -2.0), Budget(seconds=20), slowdown=2.0) == pytest.approx(-0.5)


def test_half_of_the_words_are_given() -> None:
    assert halves("one two  three four five") == ("one two", "  three four five")
    assert halves("one") == ("one", "")


def test_perplexity_is_that_of_the_second_half_by_hand(folder: Path, tmp_path: Path) -> None:
    path = study_file(folder, tmp_path, 'metric = "perplexity"', 'learner = "none"')
    (result,) = results(run_study(path, tmp_path / "out"))
    task = personal_task("texts", load_study(path).tasks, 2, 0)
    tokenizer = load_tokenizer(RunConfig(model=str(folder / "model")))
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for user, scores in enumerate(result["scores"]):
        loss, count = 0.0, 0
        for text in task.of_user(user, 12, 6)[1]["text"]:
            ids = tokenizer(text)["input_ids"]  # ends with the end of text
            known = 1 + len(text.split()) // 2  # the beginning of text too
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            loss -= sum(float(logits[place - 1, ids[place]]) for place in range(known, len(ids)))
            count += len(ids) - known
        assert np.mean(scores) == pytest.approx(-loss / count, abs=1e-5)


def test_learners_find_what_was_planted_and_the_report_names_perplexity(folder: Path, tmp_path: Path) -> None:
    vary = '[vary]\nlearner = ["none", "rag", "lora", "rag+lora"]\nscope = ["local", "federated-then-local"]'
    path = study_file(folder, tmp_path, 'metric = "perplexity"\nevaluations = 2\ntarget = 4.0', vary)
    directory = run_study(path, tmp_path / "out")
    plans = {plan.cell.name: plan for plan in plan_study(load_study(path))}
    found = {result["name"]: result for result in results(directory)}
    assert set(found) == set(plans)
    assert len(found) == 6  # neither none nor rag looks at the scope
    for name, result in found.items():
        assert result["trace"][-1]["device_seconds"] == pytest.approx(plans[name].estimate.seconds, rel=0.02)
    learned = values(directory)
    assert learned["lora"] > learned["none"] + 0.5
    assert learned["rag+lora"] > learned["rag"] + 0.5
    assert learned["rag"] != learned["none"]
    report = (report_study(path, directory) / "report.md").read_text()
    assert "Metric: minus the logarithm of perplexity" in report
    assert f"{math.exp(-learned['none']):.2f}" in report


def test_answers_to_instructions(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra 'text'")
    for metric in ("exact-match", "rouge-l", "token-accuracy"):
        path = study_file(folder, tmp_path, f'metric = "{metric}"', '[vary]\nlearner = ["none", "lora"]', "pairs.jsonl")
        learned = values(run_study(path, tmp_path / metric))
        assert 0 <= learned["none"] < learned["lora"] <= 1, metric


def test_history_stands_before_the_input_and_the_answer_stays_the_same(folder: Path) -> None:
    tokenizer = load_tokenizer(RunConfig(model=str(folder / "model")))
    text, items = "the film was good and the room was warm", ["a bad meal", "so fine"]
    plain = ask(tokenizer, [text], None, [[]], 32)
    behind = ask(tokenizer, [text], None, [items], 32)
    assert behind.answers == plain.answers
    assert tokenizer.decode(plain.answers[0]) == "and the room was warm [SEP]"
    assert tokenizer.decode(plain.prompts[0]) == "[CLS] the film was good"
    assert tokenizer.decode(behind.prompts[0]) == "[CLS] a bad meal so fine the film was good"
    asked = ask(tokenizer, [text], ["fine"], [items], 120)
    assert f"a bad meal so fine {text}" in tokenizer.decode(asked.prompts[0])
    long = ask(tokenizer, [" ".join([text] * 4)], None, [["a " * 20, "so " * 20]], 32)
    words = tokenizer.decode(long.prompts[0]).split()
    assert len(words) == len(long.answers[0]) == 16
    assert (words.count("a"), words.count("so")) == (4, 4)  # alike, and half of what is given stays
    with pytest.raises(ConfigError, match="max_length = 40: half of it is for what a model is given, of which"):
        ask(tokenizer, [text], ["fine"], [[]], 40)


def test_the_users_with_the_most_rows_are_taken(folder: Path) -> None:
    tables: dict[str, Any] = {
        "texts": {"data": str(folder / "texts.jsonl"), "task": "causal-lm", "user_column": "writer"}
    }
    task = personal_task("texts", tables, 2, 0)
    assert {tuple(set(task.frame["writer"].iloc[pool])) for pool in task.pools} == {("a",), ("b",)}


@pytest.mark.parametrize(
    ("head", "more", "keys", "data", "message"),
    [
        ("", "", KEYS, "texts.jsonl", "metric = 'accuracy' is for classes, and task 'texts' has texts of"),
        ('metric = "rouge-l"', "", KEYS, "texts.jsonl", "is for responses to instructions, and task 'texts' has texts"),
        ('metric = "perplexity"', "", KEYS.replace("causal-lm", "classification") + 'label_column = "writer"',
         "texts.jsonl", "metric = 'perplexity' is for texts of task = 'causal-lm', and task 'texts' has classes; use"),
        ('metric = "perplexity"\ntarget = 0.5', "", KEYS, "texts.jsonl", "target = 0.5: a perplexity is at least 1"),
        ("", "", KEYS.replace("writer", "author"), "texts.jsonl",
         "[tasks.texts] user_column = 'author': no such column in the data; it has"),
        ("", "", KEYS + 'partition = "iid"', "texts.jsonl", "user_column and partition both say whose a row is"),
        ("", "", KEYS.replace("causal-lm", "summary"), "texts.jsonl", "[tasks.texts] task: 'summary' must be one of"),
        ('metric = "perplexity"', "", 'data = "{data}"\ntask = "causal-lm"', "dev_questions.json",
         "test_examples = 6: every user of task 'texts' has 1 question; set test_examples = 1"),
        ('metric = "perplexity"', "seed = 1", KEYS, "texts.jsonl", "seed: a study sets it itself"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_before_anything_runs(
    folder: Path, tmp_path: Path, head: str, more: str, keys: str, data: str, message: str
) -> None:
    write(folder, "LaMP_2", [films(9, "1"), films(9, "2")], ["war", "love"])
    with pytest.raises(FedSpineError) as caught:
        plan_study(load_study(study_file(folder, tmp_path, head, more, data, keys)))
    assert message in str(caught.value)


def test_rows_of_nobody_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,writer\n" + "one two,a\n" * 9 + "one two,\n" * 9)
    tables = {"texts": {"data": str(tmp_path / "rows.csv"), "task": "causal-lm", "user_column": "writer"}}
    with pytest.raises(FedSpineError, match="of the training rows has an empty 'writer'"):
        personal_task("texts", tables, 1, 0)


def test_more_users_than_there_are(folder: Path, tmp_path: Path) -> None:
    path = study_file(folder, tmp_path, 'metric = "perplexity"', "")
    path.write_text(path.read_text().replace("users = 2", "users = 4"))
    with pytest.raises(FedSpineError, match="users = 4: column 'writer' of task 'texts' names 3; use at most as many"):
        plan_study(load_study(path))


def test_an_empty_history_cannot_be_searched(folder: Path, tmp_path: Path) -> None:
    (plan,) = plan_study(_with_no_history(folder, tmp_path))
    assert plan.estimate.infeasible == "examples = 0: retrieval from an empty history"


def _with_no_history(folder: Path, to: Path) -> Study:
    path = study_file(folder, to, 'metric = "perplexity"', 'learner = "rag"')
    path.write_text(path.read_text().replace("examples = 12", "examples = 0"))
    return load_study(path)


def test_the_loss_of_a_unigram_by_hand() -> None:
    """Each token by the other rows' counts plus one: 1 of 1 + 4 tokens, twice, and 1 of 2 + 4."""
    assert unigram_loss([[1, 1], [2]], vocabulary=4) == pytest.approx(2 * math.log(5) + math.log(6))


@pytest.mark.parametrize(("task", "metric"), [("classification", "accuracy"), ("causal-lm", "exact-match")])
def test_files_of_lamp_are_studied(folder: Path, tmp_path: Path, task: str, metric: str) -> None:
    path = write(tmp_path / "lamp", "LaMP_2", [films(9, "1"), films(14, "2"), films(12, "3")], ["war", "love", "war"])
    keys = f'data = "{Path(path).as_posix()}"\ntask = "{task}"'
    vary = '[vary]\nlearner = ["rag", "lora"]'
    study = study_file(folder, tmp_path, f'metric = "{metric}"', vary, keys=keys)
    study.write_text(study.read_text().replace("test_examples = 6", "test_examples = 1").replace("= 12", "= 10"))
    for result in results(run_study(study, tmp_path / "out")):
        assert [len(user) for user in result["scores"]] == [1, 1]


def test_difficulty_of_texts_is_what_the_model_and_the_history_do_not_know(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice((*GOOD, *BAD, *OTHER), 10)) for _ in range(24)]
    lines = {"again": texts[:6] * 4, "new": texts}
    found = {}
    for name, rows in lines.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text, "writer": "a"}) + "\n" for text in rows))
        task = personal_task(name, {name: {"data": str(path), "task": "causal-lm", "user_column": "writer"}}, 1, 0)
        config = RunConfig.from_values(
            {"method": "fedavg", "task": "causal-lm", "model": str(folder / "model"), "max_length": 32, "devices": 1,
             "sampled": 1, "data": name}
        )  # fmt: skip
        found[name] = measure_text(task, config, 16, 2, "dense", str(folder / "model"))
    assert found["again"].retrieval_gain > 0.5
    assert found["new"].retrieval_gain < 0.2
    assert found["again"].copy_rate > found["new"].copy_rate
    assert found["again"].score < found["new"].score
    assert found["new"].zero_shot > 0.9  # random weights


def test_recommendations_for_texts(folder: Path, tmp_path: Path) -> None:
    model, board = str(folder / "model"), str(folder / "board.toml")
    rows = (folder / "texts.jsonl").read_text()
    names = [rows, *(rows.replace('"writer": "', f'"writer": "{more}') for more in "xy")]  # nine writers
    (tmp_path / "rows.jsonl").write_text("".join(names))
    (tmp_path / "task.toml").write_text(KEYS.format(data="rows.jsonl") + "max_length = 32\n")
    found = recommend(board, str(tmp_path / "task.toml"), 10, 1.0, models=(model,), encoder=model, probe_minutes=0.02)
    assert {option.levels["learner"] for option in found.options} == {"rag", "lora", "rag+lora"}
    assert {option.levels["compression"] for option in found.options if option.levels["learner"] == "rag"} == {
        "none", "bf16", "width:0.5",
    }  # fmt: skip
    probed = [option.probed for option in found.options[:4]]
    assert probed[0] == max(value for value in probed if value is not None)
    (tmp_path / "study.toml").write_text(found.study_file(found.options[0]))
    study = load_study(tmp_path / "study.toml")
    assert (study.metric, study.test_examples) == ("perplexity", 20)
    with pytest.raises(ConfigError, match="hours"):
        recommend(board, str(tmp_path / "task.toml"), 10, 0.0)


def write_copying_model(folder: Path) -> None:
    """The tiny Llama, trained to say the word again that it has read after every other word before."""
    tokenizer = load_tokenizer(
        RunConfig(model=str(write_model(folder, family="llama", language=True, max_position_embeddings=64)))
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(150):
            habits = rng.choice((*GOOD, *BAD), 32)
            texts = [" ".join(f"{word} {habit}" for word in rng.choice(OTHER, 4)) for habit in habits]
            ids = torch.tensor(tokenizer(texts)["input_ids"])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)


def test_what_is_found_helps_a_model_that_copies(folder: Path, tmp_path: Path) -> None:
    write_copying_model(tmp_path / "model")
    habits, rng = {"a": "good", "b": "stale"}, np.random.default_rng(1)
    lines = [
        {"text": f"{rng.choice(OTHER)} {habit}", "writer": who} for who, habit in habits.items() for _ in range(40)
    ]
    (tmp_path / "habits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "board.toml").write_text(DEVICE.format(8))
    vary = '[vary]\nlearner = ["none", "rag"]'
    found = values(
        run_study(study_file(tmp_path, tmp_path, 'metric = "token-accuracy"', vary, "habits.jsonl"), tmp_path / "out")
    )
    assert found["none"] < 0.6
    assert found["rag"] > found["none"] + 0.3


@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "shakespeare_roles").is_dir(), reason="the shared data folder is absent")
def test_the_shipped_study_of_roles_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study("experiments/study/stories.toml")
    plans = plan_study(study)
    assert len(study.vary) >= 4
    assert all(not plan.estimate.infeasible for plan in plans)
