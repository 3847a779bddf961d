"""All harnesses in alternation: how many rounds per minute each one makes, against each peer, and the accuracy reached.

    python -m benchmarks.peers.run --data DIR --pfl-python ENV/bin/python [--repeats 3] [--out peers.json]

Every harness runs in a process of its own, one at a time. A harness that cannot run is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.peers import common

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("flowertune", "pfl")
HARNESSES: dict[str, tuple[str, ...]] = {
    "fedspine": ("ours",),
    "fedspine, bfloat16": ("ours", "--dtype", "bfloat16"),
    "fedspine, half cut": ("ours", "--sparsity", "0.5"),
    "fedspine, bfloat16, half cut": ("ours", "--dtype", "bfloat16", "--sparsity", "0.5"),
    "flowertune": ("flowertune",),
    "pfl": ("pfl",),
}
"""By name: the module and its options."""

Run = dict[str, Any]
"""What a harness printed: `seconds` by round, `accuracy`, `versions`."""


def main() -> None:
    options = parse()
    interpreters = {"ours": options.python, "flowertune": options.flower_python, "pfl": options.pfl_python}
    left = {name: call for name, call in HARNESSES.items() if interpreters[call[0]]}
    for name in HARNESSES.keys() - left.keys():
        print(f"{name}: left out, name its interpreter with --{name}-python")
    runs: dict[str, list[Run]] = {name: [] for name in left}
    asked = len(left)
    for repeat in range(options.repeats):
        for name, call in list(left.items()):
            print(f"repeat {repeat + 1} of {options.repeats}: {name}", file=sys.stderr, flush=True)
            try:
                runs[name].append(run(interpreters[call[0]], call, options, repeat))
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{name}: left out, {reason(error)}")
                del left[name], runs[name]
    print(table(runs))
    if options.out:
        settings = {name: getattr(options, name) for name in ("rounds", "sampled", "steps", "repeats")}
        machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        options.out.write_text(json.dumps({"settings": settings, "machine": machine, "runs": runs}, indent=2) + "\n")
    sys.exit(len(left) < asked)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    common.add_work(parser)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each harness; the seed is the repeat's")
    parser.add_argument("--out", type=Path, help="JSON file with every figure")
    parser.add_argument("--python", default=sys.executable, help="interpreter with fedspine")
    parser.add_argument("--flower-python", default=sys.executable, help="interpreter with fedspine, flwr and peft")
    parser.add_argument("--pfl-python", default="", help="interpreter with pfl, torch, transformers and peft")
    return parser.parse_args()


def run(interpreter: str, call: tuple[str, ...], options: argparse.Namespace, seed: int) -> Run:
    """One process of a harness.

    Errors: `OSError` without such an interpreter, `CalledProcessError` when the harness fails.
    """
    work = [f"--{name}={getattr(options, name)}" for name in ("rounds", "sampled", "steps")]
    work += [f"--data={options.data.resolve()}", f"--seed={seed}"]
    command = [interpreter, "-m", f"benchmarks.peers.{call[0]}", *call[1:], *work]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


def reason(error: OSError | subprocess.CalledProcessError) -> str:
    """One line: the last that the process said."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {error.returncode}"
    return str(error)


def table(runs: dict[str, list[Run]]) -> str:
    """Speed against each peer (the median over repeats of paired ratios), rounds per minute, accuracy."""
    peers = [peer for peer in PEERS if peer in runs]
    lines = [" ".join([f"{'':28s}", *(f"{'x ' + peer:>14s}" for peer in peers), " rounds/min", "  accuracy"])]
    for name, done in runs.items():
        ratios = [
            median(mean(theirs["seconds"]) / mean(own["seconds"]) for own, theirs in zip(done, runs[peer], strict=True))
            for peer in peers
        ]
        pace = 60 / mean(second for each in done for second in each["seconds"])
        accuracy = mean(each["accuracy"] for each in done)
        lines.append(
            " ".join([f"{name:28s}", *(f"{ratio:14.2f}" for ratio in ratios), f"{pace:11.2f}{accuracy:11.4f}"])
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
