"""The SuperExec of a device: one process answers the messages of a run, and another one takes over where it must."""

from __future__ import annotations

from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.exit.exit_handler import add_exit_handler
from flwr.supercore.superexec.executor import ExecutionSpec

from fedspine.flower import superexec


class Executor(superexec.ResidentExecutor):
    """With pipes in place of processes; `ends` are those of the processes."""

    def __init__(self) -> None:
        self._messages, self._app = None, None
        self.ends: list[Connection] = []

    def _process(self) -> Connection:
        ours, theirs = Pipe()
        self.ends.append(theirs)
        return ours

    def give(self, app: str | None) -> dict[str, Any]:
        """What the newest process is sent."""
        spec = ExecutionSpec(TaskType.CLIENT_APP, "127.0.0.1:1", "token", True, None, False, 1, False, 1, app)
        self.launch(spec)
        received: dict[str, Any] = self.ends[-1].recv()
        return received


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superexec, "MOMENT_SECONDS", 0.1)


def test_a_process_answers_one_message_after_the_other() -> None:
    executor = Executor()
    for _ in range(3):
        sent = executor.give("run")
        assert (sent["runtime_api_address"], sent["token"], sent["insecure"]) == ("127.0.0.1:1", "token", True)
        executor.ends[-1].send(None)
    assert len(executor.ends) == 1


@pytest.mark.parametrize("case", ["at work", "dead", "another app", "unknown app"])
def test_another_process_takes_over(case: str) -> None:
    executor = Executor()
    executor.give("run")
    if case == "dead":
        executor.ends[-1].close()
    elif case != "at work":
        executor.ends[-1].send(None)
    executor.give({"another app": "other", "unknown app": None}.get(case, "run"))
    assert len(executor.ends) == 2


def test_after_a_message_flower_tidies_up_and_the_process_stays() -> None:
    done: list[str] = []
    add_exit_handler(lambda: done.append("last"))
    add_exit_handler(lambda: done.append("first"), run_before_force_exit=True)
    for _ in range(2):
        superexec._leave(0, event_type=None)
    assert done == ["first", "last"]
