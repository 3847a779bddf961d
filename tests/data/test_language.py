"""Texts and instructions for a causal language model: what is found, what is learned, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import BertTokenizerFast

from fedspine.config import RunConfig
from fedspine.data.encode import IGNORED, Encoded, evaluation_batches
from fedspine.data.language import encode_language
from fedspine.data.partition import partition_rows
from fedspine.data.task import load_task
from fedspine.errors import DataError
from tests.small_run import write_words

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
ROWS = pd.DataFrame(
    {
        "instruction": ["name a room", "is it good", "and so", "name a meal"],
        "context": ["", "the film was fine", None, ""],
        "response": ["the warm room", "very good", "so and so", "a cold meal"],
        "category": ["open", "closed", "open", "open"],
    }
)
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def config(data: Path, **values: Any) -> RunConfig:
    return RunConfig.from_values({"task": "causal-lm", "data": str(data), "devices": 2, "sampled": 1, **values})


def folder(path: Path, rows: pd.DataFrame = ROWS) -> Path:
    path.mkdir()
    for name in ("train", "test"):
        rows.to_json(path / f"{name}.jsonl", orient="records", lines=True)
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return write_words(tmp_path / "words", eos_token="[SEP]")


def learned(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The text of every row on which the loss is taken."""
    starts = encoded.offsets
    assert encoded.learned is not None
    rows = [slice(start, end) for start, end in pairwise(starts)]
    return [tokenizer.decode(encoded.ids[row][encoded.learned[row]]) for row in rows]


def test_instructions_are_found_with_context_response_and_category(tmp_path: Path) -> None:
    task = load_task(config(folder(tmp_path / "rows")))
    assert task.train["text"].tolist() == [
        "name a room", "is it good\n\nthe film was fine", "and so", "name a meal",
    ]  # fmt: skip
    assert task.train["text_pair"].tolist() == ROWS["response"].tolist()
    assert task.classes == ("closed", "open")
    assert task.train["label"].tolist() == [1, 0, 1, 1]


def test_only_the_response_and_its_end_are_learned(tokenizer: Any) -> None:
    encoded = encode_language(
        tokenizer, ["name a room", "and"], ["the warm room", "so"], np.array([1, 0]), max_length=40
    )
    assert learned(tokenizer, encoded) == ["the warm room [SEP]", "so [SEP]"]
    assert encoded.labels.tolist() == [1, 0]
    assert encoded.answers.tolist() == encoded.ids[encoded.learned].tolist()
    (batch,) = evaluation_batches(encoded, 2, pad_id=0)
    assert (batch.labels != IGNORED).sum() == 6
    given = batch.labels == IGNORED
    assert (batch.labels[~given] == batch.input_ids[~given]).all()


def test_a_chat_template_is_used_where_there_is_one(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    tokenizer.add_tokens(["<user>", "<assistant>"])
    encoded = encode_language(tokenizer, ["a fresh room"], ["the warm room"], np.array([0]), max_length=40)
    assert tokenizer.decode(encoded.ids) == "<user> a fresh room <assistant> the warm room"
    assert learned(tokenizer, encoded) == ["the warm room"]


def test_what_is_too_long_loses_its_beginning_and_then_the_end_of_the_response(tokenizer: Any) -> None:
    words = "the film was very good and so quite fine"
    for given, answer, left in (
        (f"{words} {words}", "good", "good [SEP]"),
        ("name", f"{words} {words}", "the film was very good"),
    ):
        encoded = encode_language(tokenizer, [given], [answer], np.array([0]), max_length=10)
        assert len(encoded.ids) == 10
        assert learned(tokenizer, encoded)[0].startswith(left)


def test_long_plain_text_becomes_several_rows(tokenizer: Any) -> None:
    text = "the film was very good and so quite fine"
    encoded = encode_language(tokenizer, [text, "so"], None, np.array([3, 4]), max_length=5)
    whole = tokenizer(text)["input_ids"]  # ends with the end of text
    assert encoded.lengths.tolist() == [5, 5, 3, 3]
    assert encoded.labels.tolist() == [3, 3, 3, 4]
    assert encoded.learned is not None
    assert not encoded.learned[encoded.offsets[:-1]].any()  # nothing comes before the first token
    assert encoded.ids[encoded.learned].tolist() == [*whole[1:], *tokenizer("so")["input_ids"][1:]]


def test_lists_of_texts_become_rows_of_their_user(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    users = pd.DataFrame({"user": ["a", "b", "c"], "speeches": [["one", "two"], ["three"], ["four", "five"]]})
    users.to_json(path, orient="records", lines=True)
    task = load_task(config(path, partition="column:user", text_column="speeches"))
    assert len(task.train) + len(task.test) == 5
    parts = partition_rows(task, config(path, partition="column:user"))
    assert all(len(set(task.train["user"].iloc[rows])) == 1 for rows in parts)


def test_without_categories_rows_are_dealt_out_evenly(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    pd.DataFrame({"text": [f"story {row}" for row in range(40)]}).to_json(path, orient="records", lines=True)
    task = load_task(config(path))
    assert (len(task.train), len(task.test)) == (36, 4)
    assert [len(rows) for rows in partition_rows(task, config(path))] == [18, 18]


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        (ROWS.assign(response=["x", " ", "y", "z"]), {}, "row 2 of the train rows has an empty 'response'"),
        (ROWS.drop(columns="response"), {"instruction_column": "instruction"}, "Name it with response_column"),
        (ROWS, {"response_column": "reply"}, "no column 'reply'; it has instruction, context, response, category"),
        (ROWS[["category"]], {}, "no column named text, content"),
    ],
)
def test_refused(tmp_path: Path, rows: pd.DataFrame, keys: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_task(config(folder(tmp_path / "rows", rows), **keys))
    assert message in str(caught.value)


def test_the_embedded_data_are_no_texts_to_continue() -> None:
    with pytest.raises(DataError, match="name texts or instructions with data = FILE, FOLDER or hub name"):
        load_task(RunConfig.from_values({"task": "causal-lm"}))


def test_a_hub_data_set_with_training_rows_only_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub = tmp_path / "hub"
    hub.mkdir()
    pd.concat([ROWS] * 5).to_json(hub / "train.jsonl", orient="records", lines=True)
    from fedspine.data.task import _from_hub

    train, test = _from_hub(config(Path("hub")))
    assert (len(train), len(test)) == (18, 2)


@pytest.mark.skipif(not (SHARED / "dolly").is_dir(), reason="the shared data folder with dolly is absent")
def test_dolly() -> None:
    task = load_task(config(SHARED / "dolly", devices=8))
    assert len(task.classes) == 8
    assert not task.train["text_pair"].str.strip().eq("").any()
    assert len(partition_rows(task, config(SHARED / "dolly", devices=8))) == 8


@pytest.mark.skipif(not (SHARED / "shakespeare_roles").is_dir(), reason="the shared data folder is absent")
def test_shakespeare_by_role() -> None:
    of = config(SHARED / "shakespeare_roles/users.jsonl", devices=80, sampled=4, partition="column:user")
    task = load_task(of)
    assert len(partition_rows(task, of)) == 80


def test_words(tokenizer: BertTokenizerFast) -> None:
    """The tokenizer of these tests begins texts and ends them, as some do."""
    assert tokenizer("so")["input_ids"][-1] == tokenizer.eos_token_id
