"""The task that the project generates itself: what does this person want from the house?

Most requests name two things, the one that is wanted and one that is not: `not the radio but a warmer bedroom`, `my
sister asks for the forecast , i would like more eggs`. Which words occur says little about which of the two it is;
that hangs on negation, time, order and who speaks. Six classes.

Every writer (one per device) has a household's words, a taste in sentence forms, a register and a mix of wishes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

CLASSES = ("light", "music", "heating", "shopping", "alarm", "weather")
TEST_ROWS = 480
ROWS_PER_WRITER = (100, 260)
WORDS_PER_WISH = 7
"""Of the words below, how many a household uses for each class."""
FLIPPED = 0.12
ASIDE = 0.15

_THINGS: tuple[tuple[str, ...], ...] = (
    ("the lamp", "the hall lights", "a brighter kitchen", "the ceiling bulb", "a softer glow", "the porch light",
     "less glare", "the reading lamp", "the stairs lit", "the chandelier"),
    ("some jazz", "my playlist", "the radio", "that song again", "a quiet tune", "the new album", "louder drums",
     "the piano record", "party songs", "the string quartet"),
    ("a warmer bedroom", "the radiator", "two more degrees", "the thermostat", "a cosy bath", "the boiler",
     "less of a chill", "the stove", "warm floors", "the heater"),
    ("milk on the list", "more eggs", "bread for tomorrow", "a crate of apples", "some rice", "soap and sponges",
     "a bag of flour", "cheese from the market", "cat food", "a refill of coffee"),
    ("a call at six", "the alarm", "a nudge at noon", "a timer", "a reminder tonight", "an early bell",
     "ten more minutes", "a beep at seven", "to be woken", "the countdown"),
    ("the forecast", "whether it rains", "news of the storm", "the wind outside", "if it will snow",
     "how cloudy it gets", "the chance of sun", "the pollen count", "if roads freeze", "the humidity"),
)  # fmt: skip
_FORMS: tuple[tuple[str, ...], ...] = (
    ("not {no} but {yes}", "{yes} instead of {no}", "instead of {no} {yes}", "never mind {no} , {yes}"),
    ("yesterday {no} , today {yes}", "{yes} now , {no} was before", "{no} is done , next {yes}",
     "first {yes} , {no} can wait"),
    ("{who} wants {no} , i want {yes}", "i want {yes} , {who} wants {no}", "{who} asked for {no} but give me {yes}",
     "{who} thinks i want {no} , i said {yes}"),
    ("{yes} or {no} ? the first", "{no} or {yes} ? the second", "skip the first : {no} , {yes}",
     "skip the second : {yes} , {no}", "between {no} and {yes} the latter", "between {yes} and {no} the former"),
    ("do not drop {yes} , drop {no}", "i would not mind {yes} , i do mind {no}",
     "it is not {yes} that i refuse but {no}",
     "drop {no} , do not drop {yes}", "i said no to {no} , never to {yes}", "{no} is not what i lack , {yes} is"),
)  # fmt: skip
_FLIPS = (
    "just the opposite :",
    "the other way round :",
    "wrong was :",
    "swap it :",
    "nobody says :",
    "unlike before :",
)
"""What comes after them means the opposite."""
_KEEPS = ("just as before :", "once more :", "right was :", "note it :", "everybody says :", "like before :")
_ASIDES = ("{third} is fine", "{third} is done", "no word on {third}", "{third} we have")
_OPENERS = (
    "please ,",
    "hey ,",
    "good morning ,",
    "listen ,",
    "quick one :",
    "if you can ,",
    "once more :",
    "hello house ,",
)
_OTHERS = ("my sister", "grandpa", "the guest", "my neighbour", "the baby", "tom", "my wife", "the lodger")


@dataclass(frozen=True)
class _Writer:
    """One household's habits."""

    things: tuple[tuple[str, ...], ...]
    """Words for each class."""
    forms: list[float]
    """Share of each group of sentence forms, summed up."""
    opener: str
    chattiness: float
    """Share of requests that begin with the opener."""
    others: tuple[str, ...]
    mix: np.ndarray
    """Share of each class."""


def embedded_task_frames(seed: int, writers: int) -> tuple[tuple[str, ...], pd.DataFrame, pd.DataFrame]:
    """(classes, train, test): columns text, label, writer. Test rows are balanced, over all writers' styles."""
    people = [_writer(np.random.default_rng([seed, 21, index])) for index in range(writers)]
    texts: list[str] = []
    labels: list[int] = []
    owners: list[int] = []
    for index, person in enumerate(people):
        rng = np.random.default_rng([seed, 22, index])
        mine = rng.choice(len(CLASSES), int(rng.integers(*ROWS_PER_WRITER)), p=person.mix)
        mine[: len(CLASSES)] = np.arange(len(CLASSES))
        texts += [_request(person, label, rng) for label in mine.tolist()]
        labels += mine.tolist()
        owners += [index] * len(mine)
    train = _frame(texts, labels, owners)
    rng = np.random.default_rng([seed, 23])
    texts, labels, owners = [], [], []
    for row in range(TEST_ROWS):
        label, index = row % len(CLASSES), int(rng.integers(writers))
        texts.append(_request(people[index], label, rng))
        labels.append(label)
        owners.append(index)
    return CLASSES, train, _frame(texts, labels, owners)


def _frame(texts: list[str], labels: list[int], owners: list[int]) -> pd.DataFrame:
    names = [f"writer-{index:04d}" for index in range(max(owners) + 1)]  # one text for all rows of a writer
    return pd.DataFrame({"text": texts, "label": labels, "writer": [names[index] for index in owners]})


def _writer(rng: np.random.Generator) -> _Writer:
    return _Writer(
        tuple(tuple(map(str, rng.choice(things, WORDS_PER_WISH, replace=False))) for things in _THINGS),
        _steps(rng.dirichlet(np.full(len(_FORMS), 2.0))),
        _any(_OPENERS, rng),
        float(rng.uniform(0.0, 0.6)),
        tuple(map(str, rng.choice(_OTHERS, 3, replace=False))),
        0.85 * rng.dirichlet(np.full(len(CLASSES), 1.0)) + 0.15 / len(CLASSES),
    )


def _request(person: _Writer, label: int, rng: np.random.Generator) -> str:
    other = int((label + 1 + rng.integers(len(CLASSES) - 1)) % len(CLASSES))
    wanted, unwanted = (_any(person.things[wish], rng) for wish in (label, other))
    forms = _FORMS[bisect_right(person.forms, rng.random())]
    flipped = rng.random() < FLIPPED
    said, unsaid = (unwanted, wanted) if flipped else (wanted, unwanted)
    text = _any(forms, rng).format(yes=said, no=unsaid, who=_any(person.others, rng))
    if flipped or rng.random() < FLIPPED:
        text = f"{_any(_FLIPS if flipped else _KEEPS, rng)} {text}"
    if rng.random() < ASIDE:
        third = _any(person.things[int(rng.integers(len(CLASSES)))], rng)
        text = f"{text} , {_any(_ASIDES, rng).format(third=third)}"
    return f"{person.opener} {text}" if rng.random() < person.chattiness else text


def _any(items: Sequence[str], rng: np.random.Generator) -> str:
    """What `rng.choice` draws, at a tenth of its price."""
    return items[int(rng.integers(len(items)))]


def _steps(shares: np.ndarray) -> list[float]:
    """Where each share ends, for a draw by `bisect_right`: what `rng.choice(..., p=shares)` draws."""
    ends = shares.cumsum()
    return (ends / ends[-1]).tolist()  # type: ignore[no-any-return]
