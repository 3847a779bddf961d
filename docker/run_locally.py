"""Start what a compose file says as processes of this machine, without Docker: `python docker/run_locally.py --help`.

Commands, environment, order and health checks are those of the file. What a container would see is mapped: a mounted
path in a command becomes a folder under --under or the bound path, the name of a service 127.0.0.1, and mem_limit a
limit on the data of every single process (RLIMIT_DATA), not on their sum. A key of the file that is not known here is
an error, so that the file cannot grow beyond what is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, TextIO

import yaml

from fedspine.errors import FederationError, FedSpineError
from fedspine.processes import program, terminable

COMPOSE = Path(__file__).with_name("compose.yaml")
FOLLOWED = {"command", "environment", "depends_on", "healthcheck", "mem_limit", "restart", "secrets", "volumes"}
OF_CONTAINERS = {"build", "cap_drop", "image", "init", "memswap_limit", "ports", "security_opt", "stop_grace_period"}
"""Keys that a process has no use for."""
UNITS = {"m": 2**20, "g": 2**30}
POLL_SECONDS = 0.2
LAST_LINES = 3


@dataclass(frozen=True)
class Check:
    """A health check."""

    command: list[str]
    interval_seconds: float
    timeout_seconds: float
    start_seconds: float
    """In which a failure does not count."""
    retries: int


@dataclass(frozen=True)
class Service:
    """A service of the file, mapped to this machine."""

    name: str
    command: list[str]
    environment: dict[str, str]
    memory_bytes: int
    check: Check
    awaits: tuple[str, ...]
    """Services that have to be healthy before."""
    ends: bool
    """It is not started again when it has ended: the others are there for it."""


@dataclass
class Running:
    """A service that was started."""

    service: Service
    process: subprocess.Popen[str]
    log: TextIO
    started: float = field(default_factory=time.monotonic)
    checked: float = field(default_factory=time.monotonic)
    failed: int = 0
    """Checks in a row."""
    health: str = "starting"
    said: list[str] = field(default_factory=list)


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """A part of the file with its ${NAME}, ${NAME:-otherwise} and ${NAME:+instead} replaced, as Compose does it."""
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]

    def replaced(match: re.Match[str]) -> str:
        name, operator, text = match.groups()
        given = variables.get(name, "")
        if operator == ":-":
            return given or text
        return (text if given else "") if operator == ":+" else given

    return re.sub(r"\$\{(\w+)(?:(:[-+])([^}]*))?\}", replaced, value) if isinstance(value, str) else value


def services_of(compose: Path, under: Path, variables: Mapping[str, str]) -> list[Service]:
    """The services in the order of their dependencies. Makes the folders of their volumes, and copies their secrets.

    Errors: `FederationError` for a key that is not known here, or a file that is absent.
    """
    file = interpolated(yaml.safe_load(compose.read_text(encoding="utf-8")), variables)
    described: dict[str, dict[str, Any]] = file["services"]
    for name, about in described.items():
        conditions = {how["condition"] for how in about.get("depends_on", {}).values()} - {"service_healthy"}
        if unknown := about.keys() - FOLLOWED - OF_CONTAINERS | conditions:
            raise FederationError(f"{compose}: {name} has {', '.join(sorted(unknown))}, which processes cannot follow")
    order = TopologicalSorter({name: about.get("depends_on", {}) for name, about in described.items()}).static_order()
    return [_service(name, described, file.get("secrets", {}), compose.parent, under) for name in order]


def _service(name: str, described: Mapping[str, Any], secrets: Mapping[str, Any], beside: Path, under: Path) -> Service:
    about = described[name]
    places = {"/run/secrets": _secrets(about.get("secrets", []), secrets, beside, under / "secrets" / name)}
    for volume in about.get("volumes", []):
        source, target = volume.split(":")[:2]
        bound = source.startswith((".", "/"))
        places[target] = (beside / source).absolute() if bound else under / "volumes" / source
        if not places[target].exists():
            places[target].mkdir(parents=True)

    def here(word: str) -> str:
        """A word of a command as it is outside of the container."""
        host, _, port = word.rpartition(":")
        if host in described:
            return f"127.0.0.1:{port}"
        place = next((place for place in places if word == place or word.startswith(f"{place}/")), None)
        return word if place is None else f"{places[place]}{word.removeprefix(place)}"

    check = about["healthcheck"]
    interval, timeout, start = (float(check[key].removesuffix("s")) for key in ("interval", "timeout", "start_period"))
    return Service(
        name,
        [here(word) for word in shlex.split(about["command"])],
        {key: here(value) for key, value in about.get("environment", {}).items()},
        int(about["mem_limit"][:-1]) * UNITS[about["mem_limit"][-1]],
        Check([here(word) for word in check["test"][1:]], interval, timeout, start, check["retries"]),
        tuple(about.get("depends_on", {})),
        about["restart"] == "no",
    )


def _secrets(names: list[str], secrets: Mapping[str, Any], beside: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    for name in names:
        source = beside / secrets[name]["file"]
        if not source.is_file():
            raise FederationError(f"{source}: a secret of the compose file, and it is not there; make the keys first")
        shutil.copy(source, folder / name)
    return folder


class Composition:
    """What is running of some services, and what it says."""

    def __init__(self, services: list[Service], under: Path) -> None:
        self._wide = max(len(service.name) for service in services)
        self._logs = under / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self.running: dict[str, Running] = {}

    def tell(self, service: Service, line: str) -> None:
        print(f"{service.name:<{self._wide}} | {line}", flush=True)

    @contextmanager
    def started(self, service: Service) -> Iterator[None]:
        """A running service; at the end of the block it is stopped with all that it started."""
        limit = service.memory_bytes

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        self.tell(service, f"{shlex.join(service.command)}  # at most {limit // UNITS['m']} MiB in a process")
        path = self._logs / f"{service.name}.log"
        environment = {**os.environ, **service.environment}
        with (
            open(path, "w", encoding="utf-8") as output,
            open(path, encoding="utf-8") as log,
            program(
                service.command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=limited
            ) as process,
        ):
            self.running[service.name] = Running(service, process, log)
            yield
        self.tell(service, f"stopped, exit code {process.returncode}")

    def look(self) -> None:
        """Repeat what was said, and do the health checks that are due.

        Errors: `FederationError` when a service failed, ended though it should not, or does not become healthy. One
        that is unhealthy for a while is only reported, as Docker does.
        """
        for each in self.running.values():
            ended = each.process.poll()
            for line in each.log.read().splitlines():
                each.said.append(line)
                self.tell(each.service, line)
            if ended is None and time.monotonic() - each.checked > each.service.check.interval_seconds:
                self._check(each)
            elif ended is not None and (ended or not each.service.ends):
                last = " | ".join(each.said[-LAST_LINES:])
                raise FederationError(f"{each.service.name} ended with {ended}: {last}")

    def _check(self, each: Running) -> None:
        check, before = each.service.check, each.health
        try:
            result = subprocess.run(check.command, capture_output=True, text=True, timeout=check.timeout_seconds)
            code, said = result.returncode, (result.stdout + result.stderr).strip()
        except subprocess.TimeoutExpired:
            code, said = 1, f"no answer of {shlex.join(check.command)} within {check.timeout_seconds:.0f} s"
        each.checked = time.monotonic()
        if not code:
            each.health, each.failed = "healthy", 0
        elif before == "healthy" or each.checked - each.started > check.start_seconds:
            each.failed += 1
            each.health = "unhealthy" if each.failed >= check.retries else before
        if each.health != before:
            self.tell(each.service, f"{each.health}: {said}")
        if (before, each.health) == ("starting", "unhealthy"):
            raise FederationError(f"{each.service.name} is unhealthy: {said}")

    def healthy(self, names: Iterable[str]) -> bool:
        return all(self.running[name].health == "healthy" for name in names)

    def ended(self) -> bool:
        """All services that end by themselves."""
        return all(each.process.poll() is not None for each in self.running.values() if each.service.ends)


def run(compose: Path, under: Path) -> None:
    """Start the services in their order, follow them until those ended that end by themselves, and stop the others.

    Errors: `FederationError` as soon as one fails.
    """
    services = services_of(compose, under, os.environ)
    composition = Composition(services, under)
    with terminable(), ExitStack() as stack:
        for service in services:
            while not composition.healthy(service.awaits):
                composition.look()
                time.sleep(POLL_SECONDS)
            stack.enter_context(composition.started(service))
        while not composition.ended():
            composition.look()
            time.sleep(POLL_SECONDS)
        composition.look()
    for each in composition.running.values():
        if each.service.ends:
            summary = Path(each.said[-1]) / "summary.json"
            print(f"{summary}:")
            for key, value in json.loads(summary.read_text(encoding="utf-8")).items():
                print(f"  {key}: {value}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Start what a compose file says as processes of this machine, without Docker, until the run ends.",
        epilog="The variables of the file are taken from the environment. Volumes, logs and the directory of the run "
        "stay under --under; the same folder a second time continues with what is in it, as named volumes do.",
    )
    parser.add_argument("--under", type=Path, required=True, metavar="DIR", help="folder for volumes, secrets and logs")
    parser.add_argument("--compose", type=Path, default=COMPOSE, metavar="FILE", help=f"default: {COMPOSE.name}")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        run(options.compose, options.under.absolute())
    except FedSpineError as error:
        print(f"run_locally: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
