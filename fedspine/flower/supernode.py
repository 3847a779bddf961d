"""`fedspine join`: Flower's SuperNode, which connects a device to the server of `fedspine serve`."""

from __future__ import annotations

import json
import re
import shlex
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedspine.certificates import AUTHORITY, check_name, check_private_key, needed
from fedspine.devices.measured import LINK_VARIABLE
from fedspine.devices.population import load_device
from fedspine.errors import CertificateError, ConfigError, DataError, FederationError
from fedspine.flower.node import MEASURE
from fedspine.flower.superlink import flower_environment, last_lines
from fedspine.health import own_state
from fedspine.processes import program, terminable

CONNECT_SECONDS = 10.0
KEPT_LINES = 40
NOT_ACTIVATED = "Failed to activate SuperNode"
"""What Flower says of a key that is unknown, or in use."""
NOT_CONNECTED = "Failed to initialize the connection"
"""What Flower says when it gives up: it retries what it takes for the network, but not a TLS handshake that is late."""
LAST_SECONDS = 2.0
"""For what a SuperNode that ended has printed."""
ACTIVATED = "SuperNode ID: "
"""What Flower says when the server has accepted a device."""
REJOIN_SECONDS, POLL_SECONDS = 45.0, 3.0
"""How long a device is refused under the name of one that was killed: see `HEARTBEAT_SECONDS` of timed_supernode.py."""


@dataclass(frozen=True)
class Device:
    """What joins, and where."""

    server: str
    """HOST:PORT"""
    name: str
    state: Path
    """Folder of the apps that Flower unpacks."""
    certificates: Path | None = None
    """Folder with `ca.crt` and NAME.key; None: plain text."""
    data: Path | None = None
    profile: str = ""
    """`measure`, a device profile, or empty: what the run says."""


def join(device: Device, tell: Callable[[str], None]) -> None:
    """Start a SuperNode and wait until it is stopped. `tell` hears the command and every line that it prints.

    Errors: subclasses of `FedSpineError`, before anything starts, for wrong files, a state folder that another process
    has, or a server that cannot be reached; `FederationError` when the server refuses the device.
    """
    command = supernode_command(device)
    _check_server(device)
    link = device.state.absolute() / "link.json"
    environment = flower_environment(device.state) | {LINK_VARIABLE: str(link)}
    said: deque[str] = deque(maxlen=KEPT_LINES)
    joined = device.state / "joined"
    connected = False
    refused_at: float | None = None
    with own_state(device.state), terminable():
        tell(shlex.join(command))
        while True:
            status, accepted = _run_supernode(command, environment, said, joined, tell)
            connected |= accepted
            text = "".join(said)
            if not accepted and (status == 0 or NOT_ACTIVATED in text):
                refused_at = refused_at or time.monotonic()
                if not joined.exists() or time.monotonic() - refused_at > REJOIN_SECONDS:
                    raise FederationError(_reason(device, status, text))
                tell(f"{device.name} is refused: trying again, in case the server holds it for connected still")
            elif accepted and status == 0:
                # What Flower does when the server has forgotten the key; if so, the next attempt says it.
                tell(f"{device.name} lost the server, or was stopped by another program: joining again")
                refused_at = None
            elif connected and NOT_CONNECTED in text:
                tell(f"{device.name} cannot reach the server: trying again")
                refused_at = None
            else:
                raise FederationError(_reason(device, status, text))
            time.sleep(POLL_SECONDS)


def _run_supernode(
    command: list[str], environment: dict[str, str], said: deque[str], joined: Path, tell: Callable[[str], None]
) -> tuple[int, bool]:
    """Its exit status, and whether the server accepted it; then the file `joined` is there from now on."""
    said.clear()
    accepted = threading.Event()
    with program(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:

        def repeat() -> None:
            with suppress(ValueError):  # closed: the device was stopped
                for line in process.stdout or ():
                    if ACTIVATED in line:
                        accepted.set()
                        with suppress(OSError):  # a disk that is full
                            joined.touch()
                    said.append(line)
                    tell(line.rstrip())

        # In a thread: what the SuperNode started has its output too, and lives until the SuperNode is waited for.
        reader = threading.Thread(target=repeat, daemon=True)
        reader.start()
        return_code = process.wait()
        reader.join(timeout=LAST_SECONDS)
    return return_code, accepted.is_set()


def supernode_command(device: Device) -> list[str]:
    """The command line of the SuperNode.

    Errors: `CertificateError`, `DataError`, `PopulationError` for what it needs and is not there.
    """
    check_name(device.name)
    node = {"name": device.name}
    if device.data is not None:
        node["data"] = str(_readable(device.data))
    if device.profile:
        if device.profile != MEASURE:
            load_device(device.profile)
        node["device"] = device.profile
    secured = ["--insecure"]
    if device.certificates:
        key = needed(device.certificates, f"{device.name}.key")
        check_private_key(key)
        secured = [
            f"--root-certificates={needed(device.certificates, AUTHORITY)}",
            f"--auth-supernode-private-key={key}",
        ]
    return [
        *(sys.executable, "-m", "fedspine.flower.timed_supernode"),
        *secured,
        f"--superlink={device.server}",
        "--isolation=process",  # Flower starts no SuperExec: `timed_supernode` does
        f"--port={_free_port()}",  # of its own processes, on this machine only
        f"--node-config={' '.join(f'{key}={json.dumps(value)}' for key, value in node.items())}",
    ]


def _readable(data: Path) -> Path:
    """Absolute. Errors: `DataError` when nothing is there, or this user may not read it."""
    path = data.expanduser().absolute()
    if '"' in str(path):
        raise DataError(f"--data {data}: Flower takes no path with a quotation mark in it; rename the file or folder")
    try:
        if not path.exists():
            raise DataError(f"--data {data}: there is no such file or folder")
        if path.is_dir():
            empty = not any(path.iterdir())
        else:
            with path.open("rb") as rows:
                empty = not rows.read(1)
    except OSError as error:
        raise DataError(f"--data {data}: cannot be read ({error}); give it to the user who runs this (chown)") from None
    if empty:
        raise DataError(f"--data {data}: it is empty; give the file or folder with this device's own rows")
    return path


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return int(unused.getsockname()[1])


def _check_server(device: Device) -> None:
    """Errors: `FederationError` when nothing answers, `CertificateError` when it is another server than certified."""
    match = re.fullmatch(r"\[?([^/\s\]]+)\]?:(\d{1,5})", device.server)
    if match is None:
        raise ConfigError(f"--server {device.server}: must be HOST:PORT, as `fedspine serve` prints it")
    host, port = match[1], int(match[2])
    context = _context(device.certificates / AUTHORITY) if device.certificates else None
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
            if context:
                context.wrap_socket(connection, server_hostname=host).close()
            elif not _speaks_plainly(connection):
                raise FederationError(f"--server {device.server}: it speaks TLS only; join with --certificates")
    except ssl.SSLCertVerificationError as error:
        raise CertificateError(
            f"--server {device.server}: its certificate is not accepted ({error.verify_message}); {AUTHORITY} must "
            f"come from the same `fedspine certificates`, and --host there must have named {host}"
        ) from None
    except ssl.SSLError as error:
        raise FederationError(
            f"--server {device.server}: it does not speak TLS ({error.reason}); serve with --certificates, or join "
            "with --insecure for a trial"
        ) from None
    except (OSError, OverflowError, UnicodeError) as error:
        raise FederationError(
            f"--server {device.server}: cannot be reached ({error}); start `fedspine serve` there first, and open the "
            "port in its firewall"
        ) from None


def _context(authority: Path) -> ssl.SSLContext:
    """Errors: `CertificateError` when the file is no certificate."""
    try:
        return ssl.create_default_context(cafile=authority)
    except ssl.SSLError as error:
        raise CertificateError(f"{authority}: no certificate ({error.reason})") from None


def _speaks_plainly(connection: socket.socket) -> bool:
    with suppress(OSError):
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.recv(4) == b"HTTP"
    return False


def _reason(device: Device, status: int, said: str) -> str:
    if NOT_ACTIVATED in said:
        return (
            f"--name {device.name}: the server at {device.server} refuses it: it does not know the key (copy "
            f"{device.name}.pub into its --certificates folder and start it again), or another machine joined with it, "
            "or this one did and was killed less than a minute ago"
        )
    if status == 0:  # what Flower does when a signature is not accepted
        return (
            f"--name {device.name}: the server at {device.server} refuses it: this machine's clock is off (set it by "
            "NTP here and on the server: a signature may come from 5 s ahead to 5 minutes behind), or "
            f"{device.name}.key is not the key that the server has of it; or it was stopped by another program"
        )
    return f"the SuperNode of {device.name} ended: {last_lines(said)}"
