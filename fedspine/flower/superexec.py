"""Flower's SuperExec with a process that stays; its options are those of `flower-superexec`.

Flower's own starts a process per message, which imports torch, transformers and PEFT, unpacks the run's code and loads
the model before it can begin: on a weak device that takes longer than the work. Here one process answers the messages
of a run, one after the other. It is forked from one that has imported the libraries (Python's `forkserver`), so the
next run, or a process that died, costs little too. The code of a run comes with the run: of this package nothing is
imported before.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from flwr.cli.install import install_from_fab
from flwr.proto.task_pb2 import Task
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.exit.exit_handler import SIGNAL_TO_EXIT_CODE, trigger_exit_handlers
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor
from flwr.supercore.superexec.plugin import AutoExecPlugin
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.supernode.runtime import run_clientapp

from fedspine.processes import end_with_parent

LIBRARIES = (
    "flwr.supernode.runtime.run_clientapp",
    "pandas",
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "peft",
    "torch_pruning",
)
MOMENT_SECONDS = 3.0
"""From an answer's departure until its process is ready for the next message."""


class ResidentExecutor(SubprocessExecutor):
    """Hands a message to the process that answered the one before, if that was of the same run."""

    run = 0
    """That the next message is of."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(LIBRARIES))
        forkserver.ensure_running()
        self._messages: Connection | None = None
        self._served = 0
        """The run whose code, rows and model the process has."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Errors: `OSError`, `EOFError` when no process can be started; Flower lets the SuperExec end then."""
        options = {
            "runtime_api_address": spec.runtime_api_address,
            "token": spec.token,
            "insecure": spec.insecure,
            "certificates": validate_and_resolve_root_certificates(spec.root_certificates_path, spec.insecure),
            "runtime_dependency_install": spec.runtime_dependency_install,
        }
        messages = self._messages
        try:
            if messages is None or self._served != self.run or not _waits(messages):
                messages = self._process()
            messages.send(options)
        except (EOFError, OSError):  # the process died since it answered, or that which it is forked from
            messages = self._process()
            messages.send(options)
        self._messages, self._served = messages, self.run
        return LaunchResult.accepted()

    def _process(self) -> Connection:
        """Of a new process. The one before, if it is at work still, ends after that."""
        if self._messages:
            self._messages.close()
        ours, theirs = self._context.Pipe()
        self._context.Process(target=attend, args=(theirs, os.getpid()), daemon=True).start()
        theirs.close()
        return ours


class RunPlugin(AutoExecPlugin):
    """Flower's tells the executor which code to run, but two runs can have the same: one that was resumed."""

    executor: ResidentExecutor

    def launch_task(self, token: str, task: Task) -> LaunchResult:
        self.executor.run = task.run_id
        return super().launch_task(token, task)


def _waits(messages: Connection) -> bool:
    """Whether the process at the other end has answered its message, or does so in a moment, and lives."""
    try:
        return messages.poll(MOMENT_SECONDS) and messages.recv() is None
    except (EOFError, OSError):
        return False


def attend(messages: Connection, parent: int) -> None:
    """Answer messages, given as options of Flower's `run_clientapp`, until there are no more, or no `parent`."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "fedspine"]:
        del sys.modules[name]
    vars(run_clientapp)["flwr_exit"] = _leave
    vars(run_clientapp)["install_from_fab"] = lru_cache(maxsize=1)(install_from_fab)
    start_parent_process_monitor(parent)
    while True:
        for number in SIGNAL_TO_EXIT_CODE:  # Flower's handlers are those of one message
            signal.signal(number, signal.SIG_DFL)
        try:
            options: Mapping[str, Any] = messages.recv()
        except EOFError:
            return
        run_clientapp.run_clientapp(**options)
        with suppress(OSError):  # nobody waits any more
            messages.send(None)


def _leave(code: int, *_: object, **__: object) -> None:
    """In place of `flwr_exit` at the end of a message: all of it but the exit."""
    for first in (True, False):
        trigger_exit_handlers(run_before_force_exit=first)


def superexec_command(port: int) -> list[str]:
    """The command line of the SuperExec of this process, a SuperNode whose Runtime API is at `port`."""
    # Not `python -m`: a forked process imports what is the main module here, and this must not be of this package.
    start = f"from {__name__} import main; main()"
    api = ("--insecure", "--runtime-api-address", f"127.0.0.1:{port}")
    return [sys.executable, "-c", start, *api, "--parent-pid", str(os.getpid())]


def main() -> None:
    end_with_parent()
    # To look for a GPU must not start CUDA: a forked process could not use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    vars(run_superexec)["get_executor"] = lambda *_, **__: ResidentExecutor()
    vars(run_superexec)["AutoExecPlugin"] = RunPlugin
    flower_superexec()
