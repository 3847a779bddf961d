"""The cost meter of a real device: wall clock, memory of this process, and the transfers that its SuperNode timed."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from fedspine.devices.clock import lack_of_memory
from fedspine.errors import FederationError
from fedspine.report.records import write_atomically

LINK_VARIABLE = "FEDSPINE_LINK"
"""Names the file in which the SuperNode leaves what it timed, for the process that trains."""
TELLING_BYTES = 32_768
"""A smaller transfer is mostly latency and tells nothing of the rate."""
PEAK_RESET = Path("/proc/self/clear_refs")
"""Where a 5 sets the peak of this process to what it has now: proc_pid_clear_refs(5)."""
CGROUP = Path("/sys/fs/cgroup")
"""Of this process, where it runs in a container."""


@dataclass(frozen=True)
class Link:
    """What a device knows of its connection to the server."""

    download_seconds: float = 0.0
    """Of the last message."""
    download_seconds_per_byte: float = 0.0
    """Of the last download that was large enough to tell; 0: none was."""
    upload_seconds_per_byte: float = 0.0
    """Before the first large upload: as fast as the downloads."""

    def downloaded(self, nbytes: int, seconds: float) -> Link:
        rate = seconds / nbytes if nbytes >= TELLING_BYTES else self.download_seconds_per_byte
        upload = self.upload_seconds_per_byte or rate
        return Link(seconds, rate, upload)

    def uploaded(self, nbytes: int, seconds: float) -> Link:
        return replace(self, upload_seconds_per_byte=seconds / nbytes) if nbytes >= TELLING_BYTES else self


def write_link(link: Link) -> None:
    """For processes that the SuperNode starts."""
    write_atomically(Path(os.environ[LINK_VARIABLE]), json.dumps(asdict(link)).encode())


def read_link() -> Link:
    """What the SuperNode of this process timed. Errors: `FederationError` when it times nothing."""
    try:
        return Link(**json.loads(Path(os.environ[LINK_VARIABLE]).read_text(encoding="utf-8")))
    except (KeyError, OSError):
        raise FederationError(
            "cost = 'measured': this device does not time its transfers; start it with `fedspine join`, or set "
            "cost = 'virtual'"
        ) from None


def available_bytes(cgroup: Path = CGROUP) -> float:
    """Memory that is free on the machine, or in the container if that is less: the machine's figure knows no limits.

    In a container what it has of files in its cache counts as free, as for the machine. Source: the Linux kernel's
    Control Group v2, `memory.max`, `memory.current`, and `inactive_file` in `memory.stat`.
    """
    machine = float(psutil.virtual_memory().available)
    try:
        limit, used = (int((cgroup / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines())
        return max(0.0, min(machine, limit - used + int(stat["inactive_file"])))
    except (OSError, ValueError, KeyError):  # no such group, or its limit is "max"
        return machine


class Start:
    """When a device's work on a message began. The peak of this process's memory counts anew from here."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()
        with suppress(OSError):  # elsewhere than on Linux, the peak is that of the process's whole life
            PEAK_RESET.write_text("5")


@dataclass(frozen=True)
class MeasuredMeter:
    """Seconds that this device needs, from its start on."""

    start: Start = field(default_factory=Start)
    link: Link = field(default_factory=read_link)

    @property
    def memory_bytes(self) -> float:
        """What is free, and what this process has already."""
        return available_bytes() + float(psutil.Process().memory_info().rss)

    def refusal(self, nbytes: float) -> tuple[str, str] | None:
        return lack_of_memory(nbytes, self.memory_bytes)

    def compute_seconds(self, flops: float, iterations: int) -> float:
        return time.perf_counter() - self.start.seconds

    def download_seconds(self, nbytes: float) -> float:
        return self.link.download_seconds

    def upload_seconds(self, nbytes: float) -> float:
        """At the rate of the last upload: the reply is not under way yet when it is written."""
        return nbytes * self.link.upload_seconds_per_byte

    @property
    def seconds_per_byte(self) -> float:
        """Mean of both directions."""
        return (self.link.download_seconds_per_byte + self.link.upload_seconds_per_byte) / 2

    def peak_memory_bytes(self, needed: float) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
