"""Flower's simulation runtime with Ray, quiet, in a temporary folder, and stopped at the end whatever happens.

`run_simulation` runs the `ServerApp` in a thread of its own. Here the runtime gets the extra thread, its `ServerApp`
only hands the grid over, and `run` stays in the thread of the caller. So exceptions and Ctrl-C reach the caller
unchanged, and a notebook's event loop does no harm.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Empty, Queue
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

# Ray reads these when it is imported. Its own handler would print a stack and abort on SIGTERM.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")

import ray
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedspine.errors import FederationError
from fedspine.flower.exchange import GridExchange

if TYPE_CHECKING:
    from fedspine.federation import Exchange

T = TypeVar("T")

OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory for messages: only those that are being handled lie there, one per worker."""
POLL_SECONDS = 0.05
NODES_PER_WORKER = 16
"""Flower's runtime looks for every message at every node, over and over: with a node for each of ten thousand devices
that takes longer than the messages. A request says which device is meant, so nodes stand in for any of them."""
LONGEST_TEMPORARY_PATH = 30
"""Ray's sockets add about 70 characters, and the path of a socket may have 107."""


def run_with_ray(run: Callable[[Exchange], T], app: ClientApp, devices: int, workers: int, threads: int) -> T:
    """Run `run` against `devices` virtual devices in `workers` processes.

    Errors: `FederationError` when Ray is in use already, does not start, or stops in between.
    """
    if ray.is_initialized():
        raise FederationError("engine = 'ray': Ray runs in this process already; call ray.shutdown() first")
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        directory = stack.enter_context(_short_temporary_directory())
        stack.enter_context(_environment(threads))
        stack.enter_context(_terminable())
        nodes = min(devices, NODES_PER_WORKER * workers)
        runtime = _Runtime(app, nodes, _backend_config(workers, directory))
        stack.callback(runtime.stop)
        grid = runtime.start()
        alive = runtime.check_alive
        return run(GridExchange(grid, nodes, poll_seconds=POLL_SECONDS, check_alive=alive, stand_in=True))


class _Runtime:
    """The thread that runs Flower's simulation until `stop`."""

    def __init__(self, app: ClientApp, nodes: int, backend_config: dict[str, Any]) -> None:
        self._app = app
        self._nodes = nodes
        self._backend_config = backend_config
        self._grids: Queue[Grid] = Queue()
        self._finished = threading.Event()
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._simulate, name="fedspine-ray", daemon=True)

    def start(self) -> Grid:
        """Start the runtime; returns its grid."""
        self._thread.start()
        while True:
            try:
                return self._grids.get(timeout=0.2)
            except Empty:
                self.check_alive()

    def check_alive(self) -> None:
        """Errors: `FederationError` when the runtime has stopped."""
        if not self._thread.is_alive():
            raise FederationError(
                f"engine = 'ray': Flower's simulation runtime stopped: {_root_cause(self._crash)}; "
                "engine = 'inline' needs no Ray"
            ) from self._crash

    def stop(self) -> None:
        """End the runtime; waits for the devices that are at work."""
        self._finished.set()
        self._thread.join()

    def _simulate(self) -> None:
        server_app = ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._finished.wait()

        try:
            run_simulation(server_app, self._app, self._nodes, backend_config=self._backend_config)
        except BaseException as error:  # of another thread: `check_alive` raises it where it can be seen
            self._crash = error
            self._finished.set()


def _backend_config(workers: int, directory: str) -> dict[str, Any]:
    return {
        "init_args": {
            "address": "local",
            "num_cpus": workers,
            "num_gpus": torch.cuda.device_count(),
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": "ERROR",
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": directory,
        },
        # These are the options of an actor: a worker that dies is started again. Until it is up, its messages fail.
        "client_resources": {"num_cpus": 1, "num_gpus": torch.cuda.device_count() / workers, "max_restarts": -1},
    }


def _root_cause(error: BaseException | None) -> str:
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of Flower and Ray: what matters comes as an error or a failed reply."""
    loggers = [logging.getLogger(name) for name in ("flwr", "ray")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Variables that Ray's processes inherit; afterwards the environment is as before."""
    before = dict(os.environ)
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM (`kill`, `docker stop`) unwinds the stack as Ctrl-C does, so that no process of Ray is left behind."""
    if threading.current_thread() is not threading.main_thread():  # Python sets signal handlers nowhere else
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _short_temporary_directory() -> Iterator[str]:
    usual = tempfile.gettempdir()
    directory = tempfile.mkdtemp(prefix="fs-", dir=usual if len(usual) <= LONGEST_TEMPORARY_PATH else "/tmp")
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
