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
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.exit.exit_handler import SIGNAL_TO_EXIT_CODE, trigger_exit_handlers
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.supernode.runtime import run_clientapp

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
    """Hands a message to the process that answered the one before."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(LIBRARIES))
        forkserver.ensure_running()
        self._messages: Connection | None = None
        self._app: str | None = None
        """Hash of the code that the process has."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        options = {
            "runtime_api_address": spec.runtime_api_address,
            "token": spec.token,
            "insecure": spec.insecure,
            "certificates": validate_and_resolve_root_certificates(spec.root_certificates_path, spec.insecure),
            "runtime_dependency_install": spec.runtime_dependency_install,
        }
        known = spec.fab_hash and self._app == spec.fab_hash
        if self._messages is None or not known or not _waits(self._messages):
            self._messages, self._app = self._process(), spec.fab_hash
        self._messages.send(options)
        return LaunchResult.accepted()

    def _process(self) -> Connection:
        """Of a new process. The one before, if it is at work still, ends after that."""
        if self._messages:
            self._messages.close()
        ours, theirs = self._context.Pipe()
        self._context.Process(target=attend, args=(theirs, os.getpid()), daemon=True).start()
        theirs.close()
        return ours


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
    # To look for a GPU must not start CUDA: a forked process could not use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    vars(run_superexec)["get_executor"] = lambda *_, **__: ResidentExecutor()
    flower_superexec()
