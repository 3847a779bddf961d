"""Whether a server or a device is up, and how much memory a container leaves it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedspine.cli import main
from fedspine.devices.measured import available_bytes
from fedspine.errors import FederationError
from fedspine.health import ANSWERED, LONGEST_SECONDS, TOUCH_SECONDS, answered, own_state


def test_up_is_what_was_answered_lately(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    with own_state(state):
        assert main(["health", str(state)]) == 1
    assert "no answer of the SuperLink was ever noted there" in capsys.readouterr().err
    answered(state)
    assert main(["health", str(state)]) == 0
    assert capsys.readouterr().out.startswith("up: the SuperLink answered 0 s ago")
    past = time.time() - LONGEST_SECONDS - 5
    os.utime(state / ANSWERED, (past, past))
    assert main(["health", str(state)]) == 1
    assert "the last answer of the SuperLink was 65 s ago" in capsys.readouterr().err
    answered(state)
    assert main(["health", str(state)]) == 0
    with own_state(state):  # started again
        assert main(["health", str(state)]) == 1


def test_a_state_folder_has_one_owner_while_that_lives(tmp_path: Path) -> None:
    held = f"import pathlib, fedspine.health as h\nwith h.own_state(pathlib.Path({str(tmp_path)!r})):"
    children = "\n import subprocess, time\n subprocess.Popen(['sleep', '9'])\n print(flush=True)\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", held + children], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with pytest.raises(FederationError, match=f"--state {tmp_path}: another `fedspine serve`"), own_state(tmp_path):
            pass
        owner.kill()
        owner.wait()
        with own_state(tmp_path):  # what it had started lives on
            pass


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FederationError, match=r"file/state: cannot be written \(.*Not a directory"),
        own_state(tmp_path / "file" / "state"),
    ):
        pass
    monkeypatch.setattr(os, "access", lambda *_: False)  # another user's
    with (
        pytest.raises(FederationError, match=r"cannot be written \(.*denied: '.*/file'\); give it to the user"),
        own_state(tmp_path),
    ):
        pass


def test_a_file_is_not_touched_at_every_answer(tmp_path: Path) -> None:
    answered(tmp_path)
    for age, touched in ((TOUCH_SECONDS / 2, False), (TOUCH_SECONDS * 2, True), (-9 * TOUCH_SECONDS, True)):
        then = time.time() - age
        os.utime(tmp_path / ANSWERED, (then, then))
        answered(tmp_path)
        assert ((tmp_path / ANSWERED).stat().st_mtime != pytest.approx(then, abs=0.01)) is touched


@pytest.mark.parametrize(
    ("limit", "expected"), [("300000000", 210e6), ("50000000", 0.0), ("max", None), (str(2**60), None)]
)
def test_the_memory_of_a_container_is_within_its_limit(tmp_path: Path, limit: str, expected: float | None) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("100000000\n")
    (tmp_path / "memory.stat").write_text("anon 90000000\ninactive_file 10000000\n")
    machine = psutil.virtual_memory().available
    assert available_bytes(tmp_path) == pytest.approx(machine if expected is None else expected, rel=0.2)
    assert available_bytes(tmp_path / "absent") == pytest.approx(machine, rel=0.2)
