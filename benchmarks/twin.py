"""Does a twin fitted to the first half of a real run predict the second? And what does the server itself take?

    .venv/bin/python benchmarks/twin.py [--rounds 16] [--shares 0.6,0.5,0.4,0.3] [-s KEY=VALUE] [--out DIR | --run DIR]

A SuperLink and a SuperNode per share on loopback (`fedspine serve`, `fedspine join`), with cost = measured. The process
that trains for a device of share 0.4 is stopped (SIGSTOP) for 60 % of every 0.2 s: about 2.5 times as slow. The policy
is random, so that rounds differ in pruning ratio and rank. Devices run side by side: where their shares are more than
the machine's cores, or with other work, they also slow one another down, which is then in what is predicted. `--out`
keeps the run's directory; `--run` evaluates the one of an earlier run.

Of a round's time at the server: what the slowest device says it needed, transfers included, what the server computes
(plan, aggregate, evaluate; not the checkpoint), and the rest. The log of that device's SuperNode, which is beside the
run, says how long its process had the message, and the device's report how much of that was the local round (batches,
steps, scores, cuts, probe batch). All else is overhead: to take the message, unpack it, make the model
the one it asks for, read again what has regrown, and hand the answer back. The rest are Flower's pauses: a SuperNode
looks for messages every 3 s and for answers every 0.5 s, its SuperExec for messages every 1 s, and who asks for a
tensor that is not there yet asks again after 1 s.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from fedspine.config import load_config
from fedspine.devices.fitting import fit, trained_pulls
from fedspine.report.records import read_records

CYCLE_SECONDS = 0.2
"""Of stopping and going on."""
FEDSPINE = [sys.executable, "-m", "fedspine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--shares", default="0.6,0.5,0.4,0.3", help="of the time that each device runs")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="new directory for the run (default: one that is deleted)")
    parser.add_argument("--run", type=Path, help="evaluate this run")
    options = parser.parse_args()
    shares = [float(share) for share in options.shares.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        out = (options.out or Path(folder) / "run").absolute()
        directory = options.run or federated(Path(folder), out, shares, options.rounds, options.set)
        evaluate(directory, shares)


def federated(folder: Path, out: Path, shares: Sequence[float], rounds: int, keys: Sequence[str]) -> Path:
    """A measured run in `out`; what else it needs is in `folder`."""
    port = _free_port()
    count = str(len(shares))
    settings = ["method=fedspine", "policy=random", "local_work=equal", "ramp_ratio=0.6", "cost=measured"]
    settings += [f"rounds={rounds}", f"devices={count}", f"sampled={count}"]
    settings += [f"eval_every={rounds}", "eval_devices=1", "eval_examples=64", *keys]
    serve = [*FEDSPINE, "serve", "--insecure", "--host", "127.0.0.1", "--port", str(port), "--out", str(out)]
    with ExitStack() as stack:
        for number, share in enumerate(shares):
            join = [*FEDSPINE, "join", "--insecure", "--server", f"127.0.0.1:{port}", "--name", f"device{number}"]
            state, log = ["--state", f"state{number}"], out.with_name(f"{out.name}-device{number}.log")
            stack.enter_context(_joined([*join, *state], folder, log, share, port))
        command = [*serve, *(part for each in settings for part in ("-s", each))]
        with subprocess.Popen(command, cwd=folder, env=_environment(), stdout=subprocess.DEVNULL) as server:
            memory = _peak_memory(server)
        if server.returncode:
            sys.exit(server.returncode)
        print(f"fedspine serve with its SuperLink and ServerApp: {memory / 1e6:.0f} MB resident at the most")
    return out


def _peak_memory(server: subprocess.Popen[bytes]) -> int:
    """Of a process and all that it starts, until it ends: bytes, resident at a time."""
    peak = 0
    while server.poll() is None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(server.pid)
            peak = max(peak, sum(each.memory_info().rss for each in (process, *process.children(recursive=True))))
        time.sleep(0.5)
    return peak


def evaluate(directory: Path, shares: Sequence[float]) -> None:
    """Fit to the first half of the rounds, and hold the second against it."""
    config, records = load_config(directory / "config.toml", {}), read_records(directory / "rounds.jsonl")
    half = len(records) // 2
    if not half:
        sys.exit(f"{directory}: {len(records)} finished rounds, and at least two are needed")
    errors = []
    print(f"{config.devices} devices, {len(records)} rounds, fitted to the first {half}; medians of the others")
    print(f"{'share':>6} {'GFLOP/s':>8} {'predicted':>10} {'measured':>10} {'error':>7}")
    for device, share in enumerate(shares):
        pulls = trained_pulls([pull for record in records for pull in record.pulls if pull.device == device])
        known = fit([pull for pull in pulls if pull.round <= half], config.local_iterations)
        later = [pull for pull in pulls if pull.round > half]
        predicted = [known.seconds(pull, pull.action.steps(config.local_iterations)) for pull in later]
        measured = [pull.report.seconds for pull in later]
        own = [abs(guess / true - 1) for guess, true in zip(predicted, measured, strict=True)]
        errors += own
        print(
            f"{share:>6.2f} {1e-9 / known.compute.slope:>8.2f} {median(predicted):>8.2f} s {median(measured):>8.2f} s "
            f"{median(own):>7.1%}"
        )
    print(f"median error of a round's time: {median(errors):.1%} of {len(errors)} (bar: 20 %)")
    whole = [record.wall["seconds"] for record in records]
    own = [record.wall["seconds"] - record.wall["exchange"] for record in records]
    slowest = [max(pull.report.seconds for pull in record.pulls) for record in records]
    rest = [record.wall["exchange"] - seconds for record, seconds in zip(records, slowest, strict=True)]
    parts = (("slowest device", slowest), ("server's own work", own), ("messages and starting processes", rest))
    print(
        f"a round, median: {median(whole):.1f} s; " + ", ".join(f"{name} {median(part):.2f} s" for name, part in parts)
    )
    logs = [directory.with_name(f"{directory.name}-device{number}.log") for number in range(len(shares))]
    carried = [process_seconds(log) for log in logs]
    beyond = []
    for record, mine in zip(records, own, strict=True):
        pull = max(record.pulls, key=lambda pull: pull.report.seconds)
        beyond.append(mine + carried[pull.device][record.round - 1] - local_round(pull.report.wall))
    ratios = [over / all_of_it for over, all_of_it in zip(beyond, whole, strict=True)]
    print(
        f"overhead beyond polling, median: {median(beyond):.2f} s, {median(ratios):.1%} of the round (bar: 10 %); "
        f"server's own work in it: {median(own):.2f} s"
    )


def local_round(wall: Mapping[str, float]) -> float:
    """Seconds of a device's stopwatch in which it did what the method asks for."""
    return sum(seconds for part, seconds in wall.items() if part not in ("seconds", "mount"))


def process_seconds(log: Path) -> list[float]:
    """By training message in a SuperNode's log: from when it is handed to a process until that is done, without the
    longest pause between two of its requests for tensors."""
    found, at, asked = [], dict[str, float](), list[float]()
    for line in log.read_text(errors="replace").splitlines():
        match = re.search(r"(\d{4}-\d\d-\d\d [\d:]{8},\d{3}).{0,5}:\s+([\w.]+)(: train)?", line)
        if match is None:
            continue
        now, event = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp(), match[2]
        if event == "Receiving":
            at, asked = {"train": now} if match[3] else {}, []
        at.setdefault(event, now)
        if event == "Runtime.PullObject":
            asked.append(now)
        if event == "Runtime.PushTaskOutput" and "train" in at:
            gaps = [after - before for before, after in pairwise(asked)]
            found.append(now - at["Runtime.AcquireTask"] - max(gaps, default=0.0))
    return found


@contextmanager
def _joined(command: Sequence[str], folder: Path, log: Path, share: float, port: int) -> Iterator[None]:
    """A device that joins as soon as the server listens, and is throttled until the block ends."""
    ended = threading.Event()

    def live() -> None:
        while not _listens(port):
            if ended.wait(0.5):
                return
        with (
            open(log, "w") as said,
            subprocess.Popen(command, cwd=folder, env=_environment(), stdout=said, stderr=said) as process,
        ):
            while not ended.is_set():
                _throttle(psutil.Process(process.pid), share)
            process.terminate()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _throttle(device: psutil.Process, share: float) -> None:
    """A second of a device's life."""
    apps = [each for each in device.children(recursive=True) if _trains(each)]
    for _ in range(round(1 / CYCLE_SECONDS)):
        for act, seconds in ((psutil.Process.suspend, 1 - share), (psutil.Process.resume, share)):
            for app in apps:
                with suppress(psutil.NoSuchProcess):
                    act(app)
            time.sleep(seconds * CYCLE_SECONDS)


def _trains(process: psutil.Process) -> bool:
    """Whether it was forked for a message, by the device's process that has the libraries."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        parent, command = process.parent(), process.cmdline()
        return parent is not None and "multiprocessing.forkserver" in " ".join(command) and parent.cmdline() == command
    return False


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return int(unused.getsockname()[1])


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "FLWR_LOG_LEVEL": "DEBUG"}


if __name__ == "__main__":
    main()
