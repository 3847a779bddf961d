"""Files in the form of LaMP, made here: what users, histories and questions follow, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedspine.data.lamp import QUERY, is_lamp, lamp_users
from fedspine.errors import DataError, FedSpineError
from fedspine.study.tasks import personal_task

FILMS = "Which tag does this movie relate to? Just answer with the tag name. tags: [war, love] description: "
CITED = 'For an author who has written the paper with the title "On "Rooms"", which reference is related? [1]: "A"'


def write(folder: Path, task: str, questions: list[dict[str, Any]], outputs: list[str], split: str = "dev") -> str:
    """The path of the file of questions; an answer for each in turn."""
    folder.mkdir(exist_ok=True)
    golds = [{"id": each["id"], "output": answer} for each, answer in zip(questions, outputs, strict=True)]
    (folder / f"{split}_questions.json").write_text(json.dumps(questions))
    (folder / f"{split}_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))
    return str(folder / f"{split}_questions.json")


def films(items: int, name: str = "10") -> dict[str, Any]:
    profile = [{"id": f"{name}{n}", "description": f"film {n}", "tag": ("war", "love")[n % 2]} for n in range(items)]
    return {"id": name, "input": f"{FILMS}a soldier comes home", "profile": profile}


def test_a_question_is_held_out_and_its_profile_is_the_history(tmp_path: Path) -> None:
    path = write(tmp_path / "lamp", "LaMP_2", [films(2, "10"), films(5, "11"), films(4, "12")], ["war", "love", "war"])
    assert is_lamp(path)
    task = personal_task("tags", {"tags": {"data": path, "task": "causal-lm"}}, 2, 0)
    assert [len(pool) for pool in task.pools] == [6, 5]  # the users with the most items
    history, held_out = task.of_user(0, 3, 1)
    assert held_out["text"].tolist() == [f"{FILMS}a soldier comes home"]
    assert held_out["text_pair"].tolist() == ["love"]
    assert task.queries(held_out, whole=False) == ["a soldier comes home"]
    assert len(history) == 3
    for text, answer, query in history[["text", "text_pair", QUERY]].itertuples(index=False):
        assert text == FILMS + query
        assert answer == ("war", "love")[int(query.split()[1]) % 2]
    again = personal_task("tags", {"tags": {"data": path, "task": "causal-lm"}}, 2, 1)
    assert sorted(again.pools[0]) == sorted(task.pools[0])
    assert not np.array_equal(again.pools[0], task.pools[0])


def test_classes_are_those_of_answers_and_items(tmp_path: Path) -> None:
    ratings = {
        "id": 1, "input": "What is the score of the review? review: a dull book",
        "profile": [{"text": "fine", "score": "5"}, {"text": "so", "score": 3}],
    }  # fmt: skip
    classes, (frame,) = lamp_users(Path(write(tmp_path / "lamp", "LaMP_3", [ratings], ["1"])), 1, language=False)
    assert classes == ("1", "3", "5")
    assert frame["text"].tolist() == ["a dull book", "fine", "so"]
    assert frame["label"].tolist() == [0, 2, 1]
    assert "text_pair" not in frame


@pytest.mark.parametrize(
    ("task", "asked", "item", "expected"),
    [
        ("LaMP_1", CITED, {"title": "T", "abstract": "A"}, ("Write an abstract for the paper: T", "A", 'On "Rooms"')),
        ("LaMP_4", "Headline for the following article: x: y", {"text": "t", "title": "h"},
         ("Headline for the following article: t", "h", "x: y")),
        ("LaMP_5", "Title for the following abstract of a paper: x", {"abstract": "a", "title": "t"},
         ("Title for the following abstract of a paper: a", "t", "x")),
        ("LaMP_6", "Generate a subject for the following email: x", {"text": "t", "title": "h"},
         ("Generate a subject for the following email: t", "h", "x")),
        ("LaMP_7", "Paraphrase the following tweet: x", {"text": "t"}, ("Write a tweet.", "t", "x")),
    ],
)  # fmt: skip
def test_every_text_task(
    tmp_path: Path, task: str, asked: str, item: dict[str, str], expected: tuple[str, str, str]
) -> None:
    path = write(tmp_path / "lamp", task, [{"id": "1", "input": asked, "profile": [item]}], ["gold"])
    _, (frame,) = lamp_users(Path(path), 1, language=True)
    assert (frame["text"][1], frame["text_pair"][1], frame[QUERY][0]) == expected
    assert frame["text"][0] == asked
    assert frame["text_pair"][0] == "gold"


@pytest.mark.parametrize(
    ("task", "change", "keys", "message"),
    [
        ("LaMP_9", {}, {}, "task = 'LaMP_9' must be one of LaMP_1, LaMP_2"),
        ("LaMP_2", {"profile": None}, {}, "a record '10' lacks 'profile'; it has id, input, profile"),
        ("LaMP_2", {"profile": [{"id": "7", "text": "x"}]}, {}, "a record '7' lacks 'description'; it has id, text"),
        ("LaMP_2", {"input": "what is it"}, {}, "the input of question '10' has no text after 'description:'"),
        ("LaMP_4", {}, {"task": "classification"}, "profiles of LaMP_4 hold no classes; set task = 'causal-lm'"),
        ("LaMP_2", {}, {"user_column": "id"}, "[tasks.tags]: user_column: files of LaMP say that themselves"),
    ],
)
def test_refused(tmp_path: Path, task: str, change: dict[str, Any], keys: dict[str, str], message: str) -> None:
    path = write(tmp_path / "lamp", task, [{**films(3), **change}], ["war"])
    with pytest.raises(FedSpineError) as caught:
        personal_task("tags", {"tags": {"data": path, "task": "causal-lm", **keys}}, 1, 0)
    assert message in str(caught.value)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "lamp", "LaMP_2", [films(3)], ["war"]))
    with pytest.raises(DataError, match="1 questions for users = 2; use at most as many users"):
        lamp_users(path, 2, language=True)
    (tmp_path / "lamp" / "dev_outputs.json").write_text('{"task": "LaMP_2", "golds": [{"id": "9", "output": "war"}]}')
    with pytest.raises(DataError, match="no gold has the id '10' of a question in dev_questions"):
        lamp_users(path, 1, language=True)
    (tmp_path / "lamp" / "dev_outputs.json").unlink()
    with pytest.raises(DataError, match=r"dev_outputs\.json' cannot be read"):
        lamp_users(path, 1, language=True)
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="no file of LaMP; it must be a JSON list"):
        lamp_users(path, 1, language=True)
