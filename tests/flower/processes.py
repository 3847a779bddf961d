"""`fedspine` in processes of its own, as on several machines: started, listened to, stopped, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1200
"""That a run may take."""

Start = Callable[..., "subprocess.Popen[str]"]


@contextmanager
def machines(base: Path) -> Iterator[Start]:
    """Starts `fedspine` with these arguments in the folder; at the end it has to stop and leaves nothing behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:

        def start(*arguments: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "fedspine", *map(str, arguments)]
            process = subprocess.Popen(
                command, cwd=base, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.callback(stopped, process)
            return process

        yield start


def stopped(process: subprocess.Popen[str]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not psutil.wait_procs(family, timeout=20)[1]


def until(process: subprocess.Popen[str], words: str) -> None:
    """Read what a process says until it says these words."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            return
    raise AssertionError("".join(said))


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL; what it had started has to end by itself."""
    family = psutil.Process(process.pid).children(recursive=True)
    commands = {each: each.cmdline() for each in family}
    process.kill()
    process.wait()
    assert not [commands[each] for each in psutil.wait_procs(family, timeout=30)[1]]


def worker(device: subprocess.Popen[str]) -> psutil.Process:
    """The process that answers a device's messages. It is forked: its command line is that of its parent."""
    for each in psutil.Process(device.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            parent, command = each.parent(), each.cmdline()
            if parent is not None and "multiprocessing.forkserver" in " ".join(command) and parent.cmdline() == command:
                return each
    raise AssertionError("there is none")


@contextmanager
def slowed(process: psutil.Process) -> Iterator[None]:
    """A process that stands still but for a moment now and then, in which it shows that it lives."""
    enough = threading.Event()

    def pulse() -> None:
        with suppress(psutil.NoSuchProcess):
            while not enough.is_set():
                process.suspend()
                enough.wait(14)
                process.resume()
                enough.wait(0.1)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
