"""Whether a server or a device of a real federation is up: for `fedspine health`, and so for Docker.

A file of the state folder is touched whenever the SuperLink has answered: `fedspine serve` asks it all the time what
its devices or its run do, and a device asks it for messages or, at work on one, shows itself. So a server is up when
its SuperLink answers the process that conducts the run, and a device when the server takes its signed requests. A
process that hangs stops touching.
"""

from __future__ import annotations

import time
from pathlib import Path

from fedspine.errors import FederationError

ANSWERED = "answered"
TOUCH_SECONDS = 5.0
"""Between two touches: they wear the flash memory of a device."""
LONGEST_SECONDS = 60.0
"""Without an answer, and still up: a device shows itself every ten seconds, but may fail to beside a large tensor."""


def fresh_state(state: Path) -> None:
    """Make the state folder, or take the one there is: nothing has answered yet."""
    state.mkdir(parents=True, exist_ok=True)
    (state / ANSWERED).unlink(missing_ok=True)


def answered(state: Path) -> None:
    """Note in a state folder that the SuperLink has answered just now."""
    file = state / ANSWERED
    if not file.exists() or abs(_age(file)) > TOUCH_SECONDS:
        file.touch()


def last_answer_seconds(state: Path) -> float:
    """Since the last answer. Errors: `FederationError` when there was none, or none for a minute."""
    try:
        age = _age(state / ANSWERED)
    except OSError:
        raise FederationError(
            f"{state}: no answer of the SuperLink was ever noted there; give the --state of `fedspine serve` or `join`"
        ) from None
    if abs(age) > LONGEST_SECONDS:
        raise FederationError(f"{state}: the last answer of the SuperLink was {age:.0f} s ago")
    return age


def _age(file: Path) -> float:
    """Seconds; below 0 where the clock was set back."""
    return time.time() - file.stat().st_mtime
