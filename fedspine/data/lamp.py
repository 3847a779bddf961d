"""Files of LaMP, a benchmark of personal tasks (Salemi et al., arXiv 2304.11406): questions, answers, own items.

`NAME_questions.json` is a list of `{id, input, profile}`, and `NAME_outputs.json` beside it
`{"task": "LaMP_4", "golds": [{id, output}]}`. Every question is a user of its own: it is held out, and the profile is
the history. What each task asks for, and what of it stands in an item of the profile:

| | asked | item |
|---|---|---|
| LaMP-1 | which of two papers is cited, `[1]` or `[2]` | title, abstract: no answer of this kind |
| LaMP-2 | one of 15 tags of a film | description, tag |
| LaMP-3 | a rating from 1 to 5 | text, score |
| LaMP-4 | a headline | text, title |
| LaMP-5 | the title of a paper | abstract, title |
| LaMP-6 | the subject of an e-mail | text, title |
| LaMP-7 | a tweet in other words | text: no answer of this kind |

A language model is asked as the question has it, and for an item in the same words; where items hold no such answer,
for the item itself, in words of ours. A classifier is given the text that the question is about, and has to have
answers in the items: LaMP-2 and 3. Nothing is downloaded: the files are the user's, under the licences of their
sources.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedspine.data.classification import class_names
from fedspine.errors import DataError

ENDING = "_questions.json"
QUERY = "lamp_query"
"""Column with the text that a question, or an item, is about: what retrieval compares."""


@dataclass(frozen=True)
class _Kind:
    """How a task of LaMP writes its questions and items."""

    before: str
    """What stands in a question before the text that it is about."""
    about: str
    """Field of an item with such a text."""
    answer: str
    """Field of an item with what a model is to write for it."""
    own: str = ""
    """Where that is no answer to the question: how it is asked for instead."""
    after: str = ""
    """What stands in a question after the text."""
    classes: bool = False


_KINDS = {
    "LaMP_1": _Kind('title "', "title", "abstract", "Write an abstract for the paper: ", '", which'),
    "LaMP_2": _Kind("description:", "description", "tag", classes=True),
    "LaMP_3": _Kind("review:", "text", "score", classes=True),
    "LaMP_4": _Kind("article:", "text", "title"),
    "LaMP_5": _Kind("paper:", "abstract", "title"),
    "LaMP_6": _Kind(":", "text", "title"),
    "LaMP_7": _Kind(":", "text", "text", "Write a tweet."),
}


def is_lamp(data: str) -> bool:
    """Whether `data` is a file of questions by its name."""
    return data.endswith(ENDING)


def lamp_users(path: Path, users: int, language: bool) -> tuple[tuple[str, ...], list[pd.DataFrame]]:
    """(classes, the rows of the users with the most items): the question first, then the profile.

    Columns text, label, `lamp_query`; for a language model, text is the instruction and text_pair the response.
    Errors: `DataError` for a file that is absent or of another form, fewer users, and classes of a task without any.
    """
    questions = _read(path, list)
    outputs_path = path.with_name(f"{path.name.removesuffix(ENDING)}_outputs.json")
    outputs = _read(outputs_path, dict)
    name = outputs.get("task")
    if name not in _KINDS:
        raise DataError(f"data = '{outputs_path}': task = {name!r} must be one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    if not language and not kind.classes:
        raise DataError(f"data = '{path}': profiles of {name} hold no classes; set task = 'causal-lm' in its table")
    if len(questions) < users:
        raise DataError(f"data = '{path}': {len(questions)} questions for users = {users}; use at most as many users")
    golds = {str(_field(outputs_path, gold, "id")): gold for gold in _field(outputs_path, outputs, "golds")}
    ordered = sorted(questions, key=lambda question: -len(_field(path, question, "profile")))
    frames = [_of_user(path, outputs_path, kind, question, golds, language) for question in ordered[:users]]
    if language:
        return ("all",), [frame.assign(label=0) for frame in frames]
    answers = [str(_field(outputs_path, gold, "output")) for gold in golds.values()]
    classes = class_names(pd.Series([*answers, *(answer for frame in frames for answer in frame["text_pair"])]))
    numbers = {value: number for number, value in enumerate(classes)}
    return classes, [frame.assign(label=frame.pop("text_pair").map(numbers)) for frame in frames]


def _of_user(
    path: Path, outputs_path: Path, kind: _Kind, question: Any, golds: Mapping[str, Any], language: bool
) -> pd.DataFrame:
    """Columns text, text_pair and `lamp_query`."""
    name = str(_field(path, question, "id"))
    if name not in golds:
        raise DataError(f"data = '{outputs_path}': no gold has the id '{name}' of a question in {path.name}")
    asked = str(_field(path, question, "input"))
    head, found, rest = asked.partition(kind.before)
    about = (rest.partition(kind.after)[0] if kind.after else rest).strip()
    if not found or not about:
        raise DataError(f"data = '{path}': the input of question '{name}' has no text after '{kind.before}'")
    rows = [(asked, str(_field(outputs_path, golds[name], "output")), about)]
    for item in _field(path, question, "profile"):
        own, answer = str(_field(path, item, kind.about)), str(_field(path, item, kind.answer))
        same = f"{head}{found} {own}"
        rows.append((same if not kind.own else kind.own if own == answer else kind.own + own, answer, own))
    frame = pd.DataFrame(rows, columns=["text", "text_pair", QUERY])
    return frame if language else frame.assign(text=frame[QUERY])


def _read(path: Path, form: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data = '{path}' cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, form):
        raise DataError(f"data = '{path}': no file of LaMP; it must be a JSON {'list' if form is list else 'object'}")
    return found


def _field(path: Path, record: Any, name: str) -> Any:
    if not isinstance(record, dict) or record.get(name) is None:
        has = f"it has {', '.join(record)}" if isinstance(record, dict) else f"it is {str(record)[:40]!r}"
        which = f" '{record['id']}'" if isinstance(record, dict) and "id" in record else ""
        raise DataError(f"data = '{path}': a record{which} lacks '{name}'; {has}")
    return record[name]
