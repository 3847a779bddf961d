"""`fedspine serve`: Flower's SuperLink, the devices that it accepts, and one run over them.

All traffic is TLS, and devices sign what they send, unless there are no certificates. Nothing is installed at run
time, and runs can be submitted from this machine only (`guarded_superlink`).
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TextIO

from flwr.supercore.address import resolve_bind_address

from fedspine.certificates import AUTHORITY, SERVER, SERVER_KEY, check_server_pair, needed, public_keys
from fedspine.config import RunConfig
from fedspine.config_rules import check_deployable
from fedspine.errors import ConfigError, FederationError
from fedspine.flower.bundle import bundle
from fedspine.flower.control import Control
from fedspine.health import answered, own_state
from fedspine.processes import program, terminable
from fedspine.report.records import read_records
from fedspine.run_directory import first_names
from fedspine.types import TRAINED, RoundRecord

START_SECONDS = 60.0
POLL_SECONDS = 1.0
LAST_LINES = 3
"""Of a log, in a message."""

Tell = Callable[[str], None]


def serve(
    config: RunConfig,
    directory: Path,
    *,
    certificates: Path | None,
    host: str,
    port: int,
    state: Path,
    resume: bool = False,
    least: int = 0,
    tell: Tell,
) -> None:
    """Start a SuperLink, wait for all devices, run the federation into `directory`, stop the SuperLink.

    `certificates`: folder of `fedspine certificates`; None: plain text, and any device is accepted. `state`: folder of
    the SuperLink's database and log: with the same one a restarted SuperLink knows its devices again. `resume`:
    continue the run in `directory`. `least`: devices to wait for; the others may join later; 0: all. `tell` hears what
    happens, line by line.

    Errors: `ConfigError`, `CertificateError`, `CheckpointError` before anything starts; `FederationError` when another
    process has the state folder, or the SuperLink or the run fails.
    """
    check_deployable(config)
    keys = public_keys(certificates) if certificates else {}
    names = first_names(directory, list(keys)) if resume else list(keys)
    if certificates and len(keys) != config.devices:
        raise ConfigError(
            f"devices = {config.devices}: {certificates} holds the keys of {len(keys)} ({', '.join(keys)}); "
            f"set devices = {len(keys)}, or make the missing keys with `fedspine certificates`"
        )
    if least and not (keys and 0 < least <= config.devices):
        raise ConfigError(
            f"--wait-for {least}: must be from 1 to devices = {config.devices}, and needs --certificates, whose keys "
            "name the devices that are not there yet"
        )
    _check_free(host, port)
    command = superlink_command(certificates, host, port, state)
    log = state / "superlink.log"
    with (
        own_state(state),
        terminable(),
        open(log, "a", encoding="utf-8") as output,
        _superlink(command, state, output) as process,
    ):
        tell(shlex.join(command))
        tell(f"its log: {log}")
        local = local_address(host, port)

        def check_alive() -> None:
            if process.poll() is not None:
                raise FederationError(f"the SuperLink ended: {last_lines(log.read_text(encoding='utf-8'))}")

        def check_answering() -> None:
            check_alive()
            answered(state)

        with closing(Control(local, certificates / AUTHORITY if certificates else None, check_alive)) as control:
            _await_start(control, check_alive, log)
            control.stop_all()
            nodes = control.accept_only(keys) if keys else {}
            _await_devices(control, least or config.devices, config.devices, keys, check_answering, tell)
            run = control.start(bundle(config, directory.absolute(), resume, names, least, nodes))
            _follow(control, run, directory, lambda record: tell(_line(record, config, names)), check_answering)


def superlink_command(certificates: Path | None, host: str, port: int, state: Path) -> list[str]:
    """The command line of the SuperLink. Errors: `CertificateError` when a file is absent or wrong."""
    secured = ["--insecure"]
    if certificates:
        certificate, key = needed(certificates, SERVER), needed(certificates, SERVER_KEY)
        check_server_pair(certificate, key)
        secured = [
            f"--ssl-ca-certfile={needed(certificates, AUTHORITY)}",
            f"--ssl-certfile={certificate}",
            f"--ssl-keyfile={key}",
            "--enable-supernode-auth",
        ]
    return [
        *(sys.executable, "-m", "fedspine.flower.guarded_superlink"),
        *secured,
        f"--host={host}",
        f"--port={port}",
        f"--database={state / 'superlink.db'}",
        "--isolation=subprocess",
        "--disable-runtime-dependency-installation",
    ]


def local_address(host: str, port: int) -> str:
    """Where programs of this machine reach what listens at `host`; at `::` nothing listens by IPv4."""
    return str(resolve_bind_address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))


def flower_environment(home: Path) -> dict[str, str]:
    """Of a program of Flower's: `home` holds the apps that it unpacks; nothing is installed, reported or looked up."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def last_lines(text: str) -> str:
    return " | ".join(line.strip() for line in text.splitlines()[-LAST_LINES:] if line.strip())


@contextmanager
def _superlink(command: list[str], state: Path, output: TextIO) -> Iterator[subprocess.Popen[str]]:
    environment = flower_environment(state / "flower")
    with program(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
        yield process


def _check_free(host: str, port: int) -> None:
    """Errors: `FederationError` when the port cannot be listened at."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise FederationError(
            f"--host {host} --port {port}: cannot listen there ({error}); another program, perhaps another `fedspine "
            "serve`, has it: stop that one, or choose another --port"
        ) from None


def _await_start(control: Control, check_alive: Callable[[], None], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not control.answers():
        check_alive()
        if time.monotonic() > deadline:
            raise FederationError(f"the SuperLink does not answer after {START_SECONDS:.0f} s: see {log}")
        time.sleep(0.2)


def _await_devices(
    control: Control,
    least: int,
    devices: int,
    keys: Mapping[str, bytes],
    check_answering: Callable[[], None],
    tell: Tell,
) -> None:
    before: list[str] | None = None
    while True:
        online = control.online()
        if online != before:
            missing = ", ".join(name for name in keys if name not in online)
            tell(f"{len(online)} of {devices} devices joined{f'; missing: {missing}' if missing else ''}")
            before = online
        if len(online) >= least:
            return
        check_answering()
        time.sleep(POLL_SECONDS)


def _follow(
    control: Control,
    run: int,
    directory: Path,
    tell: Callable[[RoundRecord], None],
    check_answering: Callable[[], None],
) -> None:
    """Tell every round when it is done. Errors: `FederationError` with the reason why the run failed."""
    told = len(read_records(directory / "rounds.jsonl"))
    while True:
        state = control.state(run)
        check_answering()
        for record in (records := read_records(directory / "rounds.jsonl"))[told:]:
            tell(record)
        told = len(records)
        if state.finished:
            break
        time.sleep(POLL_SECONDS)
    if not state.completed:
        reason = " ".join(state.details.removeprefix("ServerApp failed with exception: ").split())
        if (directory / "rounds.jsonl").exists():
            reason += f"; go on from the last finished round with `fedspine serve --resume {directory}`"
        raise FederationError(reason)


def _line(record: RoundRecord, config: RunConfig, names: Sequence[str]) -> str:
    def name(device: int) -> str:
        return names[device] if names else str(device)

    trained = sum(pull.report.outcome == TRAINED for pull in record.pulls)
    accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.4f}"
    away = f"; away: {', '.join(map(name, record.away))}" if record.away else ""
    lost = [f"\n  {name(p.device)}: {p.report.message}" for p in record.pulls if p.report.outcome != TRAINED]
    return (
        f"round {record.round} of {config.rounds}: {trained} of {len(record.pulls)} devices trained, "
        f"{config.cost} {record.round_seconds:.1f} s{accuracy}{away}{''.join(lost)}"
    )
