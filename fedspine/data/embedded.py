"""The task that the project generates itself: short reviews whose verdict depends on composition.

Every text weighs two sides of one thing, nearly always one good and one bad, so that counting good and bad words says
little. The verdict hangs on which side the sentence stands by (`but`, `although`, before or after), on negation (`not
exactly slow`), on time (`used to be`), and on who speaks. Classes: complaint, mixed, praise.

Every writer (one per device) has a subject, a taste in connectives and words, a register, and a label mix of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

CLASSES = ("complaint", "mixed", "praise")
TEST_ROWS = 480
ROWS_PER_WRITER = (120, 280)

_SUBJECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # subject: (aspects, words for good, words for bad)
    "cafe": (("coffee", "soup", "waiter", "terrace", "cake", "menu"), ("fresh", "warm", "tasty"), ("stale", "cold", "bland")),
    "phone": (("screen", "battery", "camera", "speaker", "case", "charger"), ("bright", "sharp", "sturdy"), ("dim", "blurry", "flimsy")),
    "film": (("plot", "cast", "ending", "music", "dialogue", "pace"), ("gripping", "witty", "moving"), ("dull", "clumsy", "flat")),
    "hotel": (("room", "bed", "breakfast", "view", "staff", "pool"), ("clean", "quiet", "spacious"), ("dirty", "noisy", "cramped")),
    "bus": (("driver", "seat", "timetable", "heating", "ticket", "route"), ("punctual", "polite", "comfortable"), ("late", "rude", "broken")),
    "book": (("opening", "hero", "style", "middle", "cover", "villain"), ("clever", "vivid", "charming"), ("tedious", "shallow", "confusing")),
    "gym": (("trainer", "shower", "locker", "class", "floor", "towel"), ("friendly", "modern", "tidy"), ("grumpy", "dated", "filthy")),
    "shop": (("cashier", "return desk", "parking", "stock", "website", "window"), ("helpful", "easy", "cheap"), ("useless", "awkward", "pricey")),
}  # fmt: skip
_GOOD = ("good", "great", "lovely", "excellent", "pleasant", "superb")
_BAD = ("bad", "poor", "awful", "terrible", "annoying", "dreadful")
_DENIALS = ("not exactly", "hardly", "far from", "anything but", "never once", "not what i would call")
_STRESS = ("really", "rather", "quite", "truly", "very", "so")
_OPENERS = ("", "honestly ,", "well ,", "to be fair ,", "look ,", "after a week :", "my verdict :", "update :")
_CLOSERS = ("", "that is all", "just saying", "as a regular", "for what it is worth", "so there", "in my view")
_OTHERS = ("my sister", "the guide", "my boss", "everyone online", "the advert", "a neighbour")


@dataclass(frozen=True)
class _Writer:
    """One person's habits."""

    subject: str
    good: tuple[str, ...]
    bad: tuple[str, ...]
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    forms: np.ndarray
    """How often each sentence form is used."""
    denial: float
    """How often a side is put by denying its opposite."""
    mix: np.ndarray
    """Share of each class."""


def embedded_task_frames(seed: int, writers: int) -> tuple[tuple[str, ...], pd.DataFrame, pd.DataFrame]:
    """(classes, train, test): columns text, label, writer. Test rows are balanced, over all writers' styles."""
    people = [_writer(np.random.default_rng([seed, 21, index])) for index in range(writers)]
    train = []
    for index, person in enumerate(people):
        rng = np.random.default_rng([seed, 22, index])
        labels = rng.choice(len(CLASSES), int(rng.integers(*ROWS_PER_WRITER)), p=person.mix)
        labels[: len(CLASSES)] = np.arange(len(CLASSES))
        train += [(_sentence(person, int(label), rng), int(label), f"writer-{index:04d}") for label in labels]
    rng = np.random.default_rng([seed, 23])
    test = []
    for row in range(TEST_ROWS):
        label, index = row % len(CLASSES), int(rng.integers(writers))
        test.append((_sentence(people[index], label, rng), label, f"writer-{index:04d}"))
    columns = ["text", "label", "writer"]
    return CLASSES, pd.DataFrame(train, columns=columns), pd.DataFrame(test, columns=columns)


def _writer(rng: np.random.Generator) -> _Writer:
    subject = str(rng.choice(list(_SUBJECTS)))
    _, good, bad = _SUBJECTS[subject]
    return _Writer(
        subject,
        (*good, *map(str, rng.choice(_GOOD, 3, replace=False))),
        (*bad, *map(str, rng.choice(_BAD, 3, replace=False))),
        ("", "", "", str(rng.choice(_OPENERS))),
        ("", "", "", str(rng.choice(_CLOSERS))),
        rng.dirichlet(np.full(4, 2.0)),
        float(rng.uniform(0.1, 0.5)),
        0.85 * rng.dirichlet(np.full(len(CLASSES), 1.0)) + 0.05,
    )


def _sentence(person: _Writer, label: int, rng: np.random.Generator) -> str:
    first, second = (str(aspect) for aspect in rng.choice(_SUBJECTS[person.subject][0], 2, replace=False))
    form = int(rng.choice(4, p=person.forms))
    if CLASSES[label] == "mixed":
        body = _mixed(person, first, second, form, rng)
    else:
        body = _verdict(person, first, second, form, CLASSES[label] == "praise", rng)
    opener, closer = str(rng.choice(person.openers)), str(rng.choice(person.closers))
    return " ".join(part for part in (opener, body, f", {closer}" if closer else "") if part)


def _verdict(person: _Writer, first: str, second: str, form: int, good: bool, rng: np.random.Generator) -> str:
    """Stands by one side: the one after `but` and its like, outside `although`, now, or the speaker's own."""
    against, stands = _side(person, first, not good, rng), _side(person, second, good, rng)
    if form == 0:
        joint = str(rng.choice(["but", "yet", ", then again", ", all the same"]))
        return f"{against} {joint} {stands}"
    if form == 1:
        joint = str(rng.choice(["although", "even though", "while", "despite people saying"]))
        return f"{joint} {against} , {stands}" if rng.random() < 0.5 else f"{stands} , {joint} {against}"
    if form == 2:
        past, now = _word(person, not good, rng), _word(person, good, rng)
        order = f"the {first} used to be {past} and is {now} now", f"the {first} is {now} and no longer {past}"
        return str(rng.choice(order))
    told = f"{rng.choice(_OTHERS)} finds {against}"
    return f"{told} , i find {stands}" if rng.random() < 0.5 else f"i find {stands} , {told}"


def _mixed(person: _Writer, first: str, second: str, form: int, rng: np.random.Generator) -> str:
    """Stands by both sides alike, in the same words that take sides elsewhere."""
    good = bool(rng.random() < 0.5)
    one, other = _side(person, first, good, rng), _side(person, second, not good, rng)
    if form == 0:
        return f"{one} {rng.choice(['and', ', at the same time', ', just as'])} {other}"
    if form == 1:
        return f"{one} while {other} , hard to choose" if rng.random() < 0.3 else f"both hold : {one} , {other}"
    if form == 2:
        a, b = _word(person, good, rng), _word(person, not good, rng)
        return f"the {first} used to be {a} and {b} and is {b} and {a} now"
    return f"{rng.choice(_OTHERS)} and i find {one} and {other}"


def _side(person: _Writer, aspect: str, good: bool, rng: np.random.Generator) -> str:
    verb = str(rng.choice(["is", "was", "seems"]))
    if rng.random() < person.denial:
        return f"the {aspect} {verb} {rng.choice(_DENIALS)} {_word(person, not good, rng)}"
    stress = f"{rng.choice(_STRESS)} " if rng.random() < 0.2 else ""
    return f"the {aspect} {verb} {stress}{_word(person, good, rng)}"


def _word(person: _Writer, good: bool, rng: np.random.Generator) -> str:
    return str(rng.choice(person.good if good else person.bad))
