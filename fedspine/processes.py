"""Processes that are stopped together: several commands at a time, or a program with all that it starts."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from fedspine.errors import FederationError

_POLL_SECONDS = 0.5
STOP_SECONDS = 15.0
"""For a program to end by itself."""


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    """For the message, should it fail."""
    command: Callable[[], list[str]]
    """Called when its turn comes."""
    poll: Callable[[], None]
    """Called again and again while it runs."""
    done: Callable[[bool], None]
    """Called once at its end, with whether it succeeded."""


def run_jobs(jobs: Sequence[Job], parallel: int) -> None:
    """Stops at the first failure, after what is under way. Errors: `FederationError` with its message."""
    stop, interrupted = threading.Event(), threading.Event()
    running: set[subprocess.Popen[str]] = set()

    def one(job: Job) -> str | None:
        failure = None if stop.is_set() else _run(job, running, stop, interrupted)
        if failure:
            stop.set()
        return failure

    with terminable(), ThreadPoolExecutor(parallel) as pool:
        try:
            failures = [failure for failure in pool.map(one, jobs) if failure]
        except BaseException:  # interrupted: the processes end too
            interrupted.set()
            stop.set()
            for process in list(running):
                process.terminate()
            raise
    if failures:
        raise FederationError(failures[0])


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM interrupts, as control-C does: a process that just ended would leave its jobs behind."""
    if threading.current_thread() is not threading.main_thread():  # handlers are set there only
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A running program; at the end of the block it and all that it started are stopped. `options`: of `Popen`."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            family = _family(process.pid)
            for stop in (psutil.Process.terminate, psutil.Process.kill):
                for each in family:
                    with suppress(psutil.NoSuchProcess):
                        stop(each)
                _, family = psutil.wait_procs(family, timeout=STOP_SECONDS)


def end_with_parent() -> None:
    """Linux kills this process when the one that started it is gone: Flower lets it end in order, but not while it
    holds a lock or waits for a thread, such as one that tries again to reach what is gone.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def _run(
    job: Job, running: set[subprocess.Popen[str]], stop: threading.Event, interrupted: threading.Event
) -> str | None:
    """What went wrong, if something did."""
    with subprocess.Popen(job.command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        running.add(process)
        if interrupted.is_set():  # while it was being started: nobody else ends it
            process.terminate()
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read() if process.stderr else ""))
        reader.start()
        while process.poll() is None and not stop.is_set():
            job.poll()
            time.sleep(_POLL_SECONDS)
        process.wait()
        reader.join()
        running.discard(process)
    job.done(not process.returncode)
    if process.returncode:
        return f"{job.name}: {errors[0].strip().removeprefix('fedspine: error: ')[-2000:]}"
    return None
