"""Personal tasks made when they are needed, so that no model has seen them, each with a planted effect.

Every user sorts requests into four folders, by a habit of their own:

- `persona-recall`: the folder belongs to the name that the request mentions, and was drawn for every name. The answer
  stands in the user's history, and nowhere else: retrieval has to win.
- `persona-rule`: the folder belongs to the one word of time in the request, by a mapping of the user's own. What else
  it says is drawn, and what is alike in content tells nothing: tuning has to win.
- `persona-null`: the folder is drawn for every request. Nobody can win.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

PERSONAS = ("persona-recall", "persona-rule", "persona-null")
FOLDERS = ("blue", "green", "red", "yellow")
NAMES_PER_USER = 64
"""Of `persona-recall`: a user's rows mention them in turn, each once in so many rows."""
_FIRST = (
    "amber", "broken", "cosmic", "dusty", "electric", "frozen", "golden", "hollow", "iron", "jolly", "lunar",
    "marble", "northern", "purple", "royal", "velvet",
)  # fmt: skip
_SECOND = (
    "anchor", "bakery", "castle", "dolphin", "engine", "forest", "guitar", "harbour", "island", "kettle", "library",
    "mountain", "orchid", "pirate", "rocket", "tiger",
)  # fmt: skip
_TIMES = (
    "yesterday", "today", "tomorrow", "never",
)  # fmt: skip
_WHO = (
    "my sister", "the neighbour", "grandpa", "our guest", "the teacher", "a friend", "the driver", "my boss",
    "the doctor", "our cousin", "the baker", "a student",
)  # fmt: skip
_DOES = (
    "buys", "paints", "cleans", "repairs", "borrows", "sells", "forgets", "orders", "packs", "returns", "finds",
    "hides",
)  # fmt: skip
_WHAT = (
    "the old car", "a red bicycle", "two tickets", "the garden chair", "some fresh bread", "a winter coat",
    "the kitchen table", "a small boat", "the piano", "many letters", "the broken lamp", "a bag of rice",
)  # fmt: skip
_ABOUT = (
    "{name} please", "file {name}", "news of {name}", "about {name}", "put {name} away", "{name} again",
    "mail of {name}", "sort {name}",
)  # fmt: skip


def persona_frame(task: str, seed: int, users: int, rows: int) -> pd.DataFrame:
    """`rows` of every user: columns text, label and user."""
    parts = [_of_user(task, np.random.default_rng([seed, 31, user]), rows) for user in range(users)]
    frames = [part.assign(user=f"user-{number:03d}") for number, part in enumerate(parts)]
    return pd.concat(frames, ignore_index=True)


def _of_user(task: str, rng: np.random.Generator, rows: int) -> pd.DataFrame:
    if task == "persona-recall":
        pairs = rng.permutation(len(_FIRST) * len(_SECOND))[:NAMES_PER_USER]
        names = [f"{_FIRST[pair // len(_SECOND)]} {_SECOND[pair % len(_SECOND)]}" for pair in pairs]
        folders = rng.permutation(np.arange(NAMES_PER_USER) % len(FOLDERS))
        order = np.resize(rng.permutation(NAMES_PER_USER), rows)
        texts = [str(rng.choice(_ABOUT)).format(name=names[index]) for index in order]
        labels = folders[order]
    else:
        times = rng.integers(len(_TIMES), size=rows)
        texts = [" ".join((*(str(rng.choice(part)) for part in (_WHO, _DOES, _WHAT)), _TIMES[time])) for time in times]
        habit = rng.permutation(len(FOLDERS))
        labels = habit[times] if task == "persona-rule" else rng.integers(len(FOLDERS), size=rows)
    return pd.DataFrame({"text": texts, "label": [FOLDERS[label] for label in labels]})
