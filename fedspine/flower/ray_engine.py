"""Flower's simulation runtime with Ray, quiet, in a temporary folder, and stopped at the end whatever happens.

Or on a cluster that runs already: then the run leaves it at the end, and it stays up.

`run_simulation` runs the `ServerApp` in a thread of its own. Here the runtime gets the extra thread, its `ServerApp`
only hands the grid over, and `run` stays in the thread of the caller. So exceptions and Ctrl-C reach the caller
unchanged, and a notebook's event loop does no harm.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Empty, Queue
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
from fedspine.flower.cluster import Cluster, Division, divide
from fedspine.flower.exchange import GridExchange
from fedspine.processes import terminable

if TYPE_CHECKING:
    from fedspine.exchange import Exchange

T = TypeVar("T")

OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory for messages: only those that are being handled lie there, one per worker."""
POLL_SECONDS = 0.05
NODES_PER_WORKER = 16
"""Flower's runtime looks for every message at every node, over and over: with a node for each of ten thousand devices
that takes longer than the messages. A request says which device is meant, so nodes stand in for any of them."""
LONGEST_TEMPORARY_PATH = 30
"""Ray's sockets add about 70 characters, and the path of a socket may have 107."""


def run_with_ray(
    run: Callable[[Exchange], T],
    app: ClientApp,
    devices: int,
    workers: int,
    threads: int,
    cluster: Cluster | None = None,
) -> T:
    """Run `run` against `devices` virtual devices in `workers` processes, or in those of a cluster, which stays up.

    Errors: `FederationError` when Ray is in use already, does not start, or stops in between.
    """
    if ray.is_initialized():
        raise FederationError("engine = 'ray': Ray runs in this process already; call ray.shutdown() first")
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_environment(threads))
        stack.enter_context(terminable())  # so that no process of Ray is left behind
        if cluster is None:
            gpus = torch.cuda.device_count()
            division = divide([(workers, gpus)], workers)
            init = _local(workers, gpus, stack.enter_context(_short_temporary_directory()))
        else:
            division = cluster.division
            # Workers on other machines inherit nothing from this process. A Ray of our own starts faster without it.
            variables = _variables(threads) | {"PYTHONPATH": os.pathsep.join(sys.path)}
            init = {"address": cluster.address, "runtime_env": {"env_vars": variables}}
        nodes = min(devices, NODES_PER_WORKER * division.workers)
        runtime = _Runtime(app, nodes, init, division)
        stack.callback(runtime.stop)
        grid = runtime.start()
        alive = runtime.check_alive
        return run(GridExchange(grid, nodes, poll_seconds=POLL_SECONDS, check_alive=alive, stand_in=True))


class _Runtime:
    """The thread that runs Flower's simulation until `stop`."""

    def __init__(self, app: ClientApp, nodes: int, init: dict[str, Any], division: Division) -> None:
        self._app = app
        self._nodes = nodes
        self._init = init
        self._division = division
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

        # These are the options of an actor: a worker that dies is started again. Until it is up, its messages fail.
        resources: dict[str, Any] = {
            "num_cpus": self._division.cpus,
            "num_gpus": self._division.gpus,
            "max_restarts": -1,
        }
        try:
            # Flower takes Ray as it finds it; its own call cannot set the environment of workers elsewhere.
            ray.init(
                **self._init,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
            run_simulation(server_app, self._app, self._nodes, backend_config={"client_resources": resources})
        except BaseException as error:  # of another thread: `check_alive` raises it where it can be seen
            self._crash = error
            self._finished.set()
        finally:
            ray.shutdown()


def _local(workers: int, gpus: int, directory: str) -> dict[str, Any]:
    """A Ray of this run alone."""
    return {
        "address": "local",
        "num_cpus": workers,
        "num_gpus": gpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": directory,
    }


def _variables(threads: int) -> dict[str, str]:
    """Of a worker."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


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
    """What Ray's own processes inherit; afterwards the environment is as before."""
    before = dict(os.environ)
    os.environ.update(_variables(threads), RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _short_temporary_directory() -> Iterator[str]:
    usual = tempfile.gettempdir()
    directory = tempfile.mkdtemp(prefix="fs-", dir=usual if len(usual) <= LONGEST_TEMPORARY_PATH else "/tmp")
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
