"""What a round with training costs the coordinating process with 100, 1,000 and 10,000 devices, 100 of them sampled.

    .venv/bin/python benchmarks/population.py [--rounds 3] [--devices 100 1000 10000] [-s partition=iid]

Every population runs in a process of its own, with the ray engine and one worker: the worker trains, so that memory and
seconds here are those of the coordinating process. Local work is small; the model is MiniLM and the data the embedded
task, which has one writer with 100 to 260 rows per device, so that it suffices for any number of devices. `plan` has
the probes of all sampled devices in it, `messages` is the exchange less the worker's own seconds, `saving` what is left
of a round: records, checkpoint, curves. An idle device has no entry in the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

import fedspine
from fedspine.checkpoint import FILE
from fedspine.config import parse_override
from fedspine.report.observer import Silent
from fedspine.types import RoundRecord

POPULATIONS = (100, 1_000, 10_000)
SAMPLED = 100
SMALL: dict[str, Any] = {
    "local_iterations": 2,
    "prune_interval": 2,
    "batch_size": 4,
    "probe_examples": 4,
    "eval_devices": 1,
}
SMALL |= {"probe": "always"}
"""By default a device is probed in its first round: then a hundred devices would be probed once, ten thousand ever."""
PARTS = ("plan", "aggregate", "messages", "saving")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, nargs="+", default=POPULATIONS)
    parser.add_argument("-s", action="append", default=[], dest="keys", metavar="key=value")
    parser.add_argument("--one", action="store_true", help="measure one population in this process, print JSON")
    options = parser.parse_args()
    if options.one:
        keys = SMALL | dict(parse_override(text) for text in options.keys)
        print(json.dumps(measured(options.devices[0], options.rounds, keys)))
        return
    print(f"{SAMPLED} devices per round, {options.rounds} rounds; seconds per round, but for the start-up")
    columns = ("devices", "start-up", *PARTS, "training", "peak memory", "checkpoint", "devices in it")
    print("".join(f"{name:>14}" for name in columns))
    for devices in options.devices:
        command = [sys.executable, __file__, "--one", "--devices", str(devices), "--rounds", str(options.rounds)]
        command += [word for text in options.keys for word in ("-s", text)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        parts = "".join(f"{found[part]:>12.2f} s" for part in ("start-up", *PARTS, "training"))
        print(
            f"{devices:>14,}{parts}{found['peak'] / 1e6:>11.0f} MB{found['checkpoint'] / 1e6:>11.2f} MB"
            f"{found['entries']:>14}",
            flush=True,
        )


class Watch(Silent):
    """Notes when the last round was done, and what its checkpoint holds: the final one has every device."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / FILE
        self.done, self.checkpoint, self.entries = 0.0, 0, 0

    def round_done(self, record: RoundRecord) -> None:
        self.done = time.perf_counter()
        self.checkpoint = self.file.stat().st_size
        self.entries = len(load_file(self.file)["structure/device-index"])


def measured(devices: int, rounds: int, keys: dict[str, Any]) -> dict[str, float]:
    """Seconds per round by part, seconds of start-up, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder) / "run")
        began = time.perf_counter()
        run = fedspine.simulate(
            out=Path(folder) / "run",
            engine="ray",
            observer=watch,
            devices=devices,
            sampled=SAMPLED,
            rounds=rounds,
            **keys,
        )
        startup = run.summary["startup_seconds"]
        whole = watch.done - began - startup
        wall = {
            part: sum(record.wall.get(part, 0.0) for record in run.records)
            for part in ("plan", "exchange", "aggregate", "evaluate")
        }
        training = run.summary["local_compute_seconds"]
        found = {
            "plan": wall["plan"],
            "aggregate": wall["aggregate"],
            "messages": wall["exchange"] - training,
            "saving": whole - sum(wall.values()),
            "training": training,
        }
        per_round = {part: seconds / rounds for part, seconds in found.items()}
        sizes = {"peak": peak_bytes(), "checkpoint": watch.checkpoint, "entries": watch.entries}
        return per_round | {"start-up": startup} | sizes


def peak_bytes() -> int:
    """Largest resident memory of this process so far; `getrusage` would count its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
