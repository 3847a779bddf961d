"""Whether a server or a device of a real federation is up: for `fedspine health`, and so for Docker.

A file of the state folder is touched whenever the SuperLink has answered: `fedspine serve` asks it all the time what
its devices or its run do, and a device asks it for messages or, at work on one, shows itself. So a server is up when
its SuperLink answers the process that conducts the run, and a device when the server takes its signed requests. A
process that hangs stops touching.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import EACCES
from pathlib import Path

from fedspine.errors import FederationError

ANSWERED, LOCK = "answered", "lock"
TOUCH_SECONDS = 5.0
"""Between two touches: they wear the flash memory of a device."""
LONGEST_SECONDS = 60.0
"""Without an answer, and still up: a device shows itself every ten seconds, but may fail to beside a large tensor."""


@contextmanager
def own_state(state: Path) -> Iterator[None]:
    """The state folder for this process alone, for as long as it lives; it is made where there is none, and nothing has
    answered yet.

    Errors: `FederationError` when another process has it, or this user may not write there.
    """
    with ExitStack() as held:
        try:
            state.mkdir(parents=True, exist_ok=True)
            foreign = next((path for path in state.iterdir() if path.is_file() and not os.access(path, os.W_OK)), None)
            if foreign:
                raise PermissionError(EACCES, os.strerror(EACCES), str(foreign))
            lock = held.enter_context(open(state / LOCK, "wb"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (state / ANSWERED).unlink(missing_ok=True)
        except BlockingIOError:
            raise FederationError(
                f"--state {state}: another `fedspine serve` or `join` that runs here has it; stop that one, or choose "
                "another --state"
            ) from None
        except OSError as error:
            raise FederationError(
                f"--state {state}: cannot be written ({error}); give it to the user who runs this (chown -R), or "
                "choose another --state"
            ) from None
        yield


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
