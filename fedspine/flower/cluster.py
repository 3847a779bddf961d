"""A Ray cluster that runs already: whether it answers, and how its CPUs and GPUs are divided among workers."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fedspine.errors import ConfigError, FederationError

ANSWER_SECONDS = 25.0
CONNECT_SECONDS = 5.0
RAY_UNITS = 10_000
"""Ray counts CPUs and GPUs in ten-thousandths. Shares are rounded down to these, or the last worker would not fit."""
# Asked in a process of its own: where something else than Ray listens, `ray.init` waits for minutes.
QUESTION = """
import json, sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
except Exception as error:
    sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
print(json.dumps([(each.get("CPU", 0), each.get("GPU", 0)) for each in resources]))
"""

Nodes = Sequence[tuple[float, float]]
"""CPUs and GPUs of every machine."""


@dataclass(frozen=True)
class Division:
    """The number of workers, and the CPUs and GPUs that Ray reserves for each."""

    workers: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """A cluster that has answered, and how a run divides it."""

    address: str
    division: Division


def check_address(address: str) -> None:
    """Errors: `ConfigError` when it is not HOST:PORT."""
    if not re.fullmatch(r"[^/\s]+:\d+", address):
        raise ConfigError(f"address = {address!r}: must be HOST:PORT, as `ray start --head` prints it")


def find_cluster(address: str, workers: int | None, cuda: bool) -> Cluster:
    """Ask the cluster at HOST:PORT for its machines, and divide those with a CPU (and with a GPU, for `cuda`).

    `workers`: at most so many; by default one per CPU.

    Errors: `FederationError` when no cluster answers within 30 seconds or none of its machines will do, `ConfigError`
    when it cannot be divided among so few workers.
    """
    check_address(address)
    nodes = [(cpus, gpus if cuda else 0) for cpus, gpus in _ask(address) if cpus >= 1 and (gpus >= 1 or not cuda)]
    if not nodes:
        raise FederationError(
            f"address = {address!r}: no machine of this cluster has {'CPUs and GPUs' if cuda else 'CPUs'}; "
            f"add one with `ray start --address={address}`{', or take torch_device = cpu' if cuda else ''}"
        )
    return Cluster(address, divide(nodes, workers))


def divide(nodes: Nodes, workers: int | None) -> Division:
    """One worker per CPU, or as many as are possible without being more than `workers`.

    Flower starts as many workers on every machine as its share of CPUs and GPUs allows, and that share is the same
    everywhere. A worker's share of a GPU is the inverse of a whole number: it must not lie across two GPUs.

    Errors: `ConfigError` when even the fewest are more than `workers`.
    """
    shares = {_rounded_down(cpus / parts) for cpus, _ in nodes for parts in range(1, int(cpus) + 1)}
    for share in sorted(shares) if workers is not None else [1.0]:
        counts = [int(cpus / share) for cpus, _ in nodes]
        if workers is None or sum(counts) <= workers:
            per_gpu = max(
                math.ceil(count / gpus) if gpus else 0 for count, (_, gpus) in zip(counts, nodes, strict=True)
            )
            return Division(sum(counts), share, _rounded_down(1 / per_gpu) if per_gpu else 0.0)
    raise ConfigError(
        f"workers = {workers}: machines of equal size get equally many workers; set workers to at least {sum(counts)}"
    )


def _rounded_down(share: float) -> float:
    return math.floor(share * RAY_UNITS) / RAY_UNITS


def _ask(address: str) -> Nodes:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        answer = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", QUESTION, address],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer in {ANSWER_SECONDS:g} seconds"
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(error)
    else:
        if answer.returncode == 0:
            return [(cpus, gpus) for cpus, gpus in json.loads(answer.stdout.splitlines()[-1])]
        reason = (answer.stderr.splitlines() or ["Ray died"])[-1]
    raise FederationError(
        f"address = {address!r}: no Ray cluster to be used from here ({reason}); start one with "
        f"`ray start --head --port={port}`, and fedspine on one of its machines"
    )
