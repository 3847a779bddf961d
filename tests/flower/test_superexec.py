"""The SuperExec of a device: one process answers the messages of a run, and another one takes over where it must."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.exit.exit_handler import add_exit_handler, trigger_exit_handlers

from fedspine.flower import superexec, timed_supernode


class Executor(superexec.ResidentExecutor):
    """With pipes in place of processes; `ends` are those of the processes."""

    def __init__(self, failures: int = 0) -> None:
        self._messages, self._served = None, 0
        self.ends: list[Connection] = []
        self.failures = failures

    def _process(self) -> Connection:
        if self.failures:
            self.failures -= 1
            raise EOFError
        ours, theirs = Pipe()
        self.ends.append(theirs)
        return ours

    def give(self, run: int = 1) -> dict[str, Any]:
        """What the newest process is sent."""
        plugin = superexec.RunPlugin("127.0.0.1:1", True, None, executor=self)
        plugin.launch_task("token", Task(task_id=1, run_id=run, type=TaskType.CLIENT_APP, fab_hash="same"))
        received: dict[str, Any] = self.ends[-1].recv()
        return received


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superexec, "MOMENT_SECONDS", 0.1)


def test_a_process_answers_one_message_after_the_other() -> None:
    executor = Executor()
    for _ in range(3):
        sent = executor.give()
        assert (sent["runtime_api_address"], sent["token"], sent["insecure"]) == ("127.0.0.1:1", "token", True)
        executor.ends[-1].send(None)
    assert len(executor.ends) == 1


@pytest.mark.parametrize("case", ["at work", "dead", "dead since it answered", "another run"])
def test_another_process_takes_over(case: str) -> None:
    executor = Executor()
    executor.give()
    if case not in ("at work", "dead"):
        executor.ends[-1].send(None)
    if case.startswith("dead"):
        executor.ends[-1].close()
    executor.give(run=2 if case == "another run" else 1)
    assert len(executor.ends) == 2


def test_a_process_that_cannot_be_started_is_tried_once_more() -> None:
    executor = Executor(failures=1)
    executor.give()
    assert len(executor.ends) == 1
    with pytest.raises(EOFError):
        Executor(failures=2).give()


def test_after_a_message_flower_tidies_up_and_the_process_stays() -> None:
    done: list[str] = []
    add_exit_handler(lambda: done.append("last"))
    add_exit_handler(lambda: done.append("first"), run_before_force_exit=True)
    for _ in range(2):
        superexec._leave(0, event_type=None)
    assert done == ["first", "last"]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_supernode_ends_with_its_superexec(monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    monkeypatch.setattr(timed_supernode, "STOP_SECONDS", 0.5)
    signals: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, number: signals.append(number))
    timed_supernode.end_with(subprocess.Popen(["true"]))
    if stopped:
        trigger_exit_handlers(run_before_force_exit=True)
    time.sleep(1)
    assert signals == ([] if stopped else [signal.SIGTERM])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_it_is_gone_with_its_parent_even_where_it_cannot_end_by_itself() -> None:
    stuck = "from fedspine.processes import end_with_parent as e; e(); print('ready', flush=True); import time\n"
    stuck += "try:\n    time.sleep(60)\nfinally:\n    time.sleep(60)\n"
    parent = (
        f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {stuck!r}]); print(c.pid, flush=True); "
    )
    with subprocess.Popen([sys.executable, "-c", parent + "c.wait()"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        process.kill()
    assert not psutil.pid_exists(child) or not psutil.wait_procs([psutil.Process(child)], timeout=10)[1]
