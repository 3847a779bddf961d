"""Peak memory of loading a model and running one batch, measured in a process of its own.

A process that has measured one model keeps memory that the next would use again, so each gets a fresh one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fedspine.bench_subject import Subject, load, random_tokens
from fedspine.errors import FedSpineError, ModelError


@dataclass(frozen=True)
class Footprint:
    """Bytes: on a CPU, resident memory of the process; on a GPU, what torch allocated there."""

    model: int
    """The peak above what the process held with torch and transformers imported; on a GPU the whole peak."""
    process: int
    """The peak of the process."""


def footprint(subject: Subject, batch: int, length: int, threads: int, device: str, dtype: str) -> Footprint:
    """Of loading the model and running [batch, length] tokens once.

    Errors: `ModelError` when it cannot be loaded, or the process was killed, as when memory runs out.
    """
    request = {
        "subject": dataclasses.asdict(subject),
        "batch": batch,
        "length": length,
        "threads": threads,
        "device": device,
        "dtype": dtype,
    }
    package = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "fedspine.bench_memory", json.dumps(request)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ModelError(
            f"{subject.name}: the process that loaded it was killed ({name}), as happens when memory runs out; "
            "use a smaller batch or length, or dtype = bfloat16"
        )
    answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    if "peak" not in answer:
        raise ModelError(answer.get("error") or f"{subject.name} cannot be run: {done.stderr.strip()[-300:]}")
    return Footprint(**answer["peak"])


def _measure(request: dict[str, object]) -> Footprint:
    """In the fresh process, which has imported everything that loading needs."""
    subject = Subject(**request["subject"])  # type: ignore[arg-type]
    device, dtype = str(request["device"]), str(request["dtype"])
    torch.set_num_threads(int(request["threads"]))  # type: ignore[call-overload]
    before = psutil.Process().memory_info().rss
    model = load(subject, device, dtype)
    tokens = random_tokens([subject], int(request["batch"]), int(request["length"]), device)  # type: ignore[call-overload]
    with torch.inference_mode():
        model(**tokens)
    process = _peak_resident()
    if device == "cuda":
        return Footprint(torch.cuda.max_memory_allocated(), process)
    return Footprint(max(0, process - before), process)


def _peak_resident() -> int:
    """Largest resident memory of this process since it started, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # no Linux; there `ru_maxrss` would hold the parent's peak too
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _main() -> None:
    try:
        print(json.dumps({"peak": dataclasses.asdict(_measure(json.loads(sys.argv[1])))}))
    except FedSpineError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    _main()
