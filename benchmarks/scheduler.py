"""What a round of the scheduler costs with 100, 10,000 and 1,000,000 devices, 100 of them sampled.

    .venv/bin/python benchmarks/scheduler.py [--rounds 50] [--policy fedspine]

Every population runs in a process of its own, so that peak memory is its own. Planning and the rest of a round should
not depend on the population; memory should by the bytes per idle device only. (With 100 devices all of them take part
in every round, so that each has more of a past to plan from.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

POPULATIONS = (100, 10_000, 1_000_000)
SAMPLED = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--policy", default="fedspine")
    options = parser.parse_args()
    print(f"policy {options.policy}, {SAMPLED} devices per round, {options.rounds} rounds")
    print(f"{'devices':>10} {'planning':>12} {'the rest':>12} {'start-up':>9} {'idle device':>12} {'peak memory':>12}")
    for devices in POPULATIONS:
        keys = {"devices": devices, "sampled": SAMPLED, "rounds": options.rounds, "policy": options.policy}
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "fedspine", "schedule", "--json", "--out", str(Path(folder) / "run")]
            for key, value in keys.items():
                command += ["-s", f"{key}={value}"]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        planning = found["planning_ms_per_round"]
        rest = 1e3 * found["wall_seconds"] / options.rounds - planning
        print(
            f"{devices:>10,} {planning:>9.1f} ms {rest:>9.1f} ms {found['startup_seconds']:>7.2f} s "
            f"{found['bytes_per_idle_device']:>10.1f} B {found['peak_rss_bytes'] / 1e6:>9.1f} MB"
        )


if __name__ == "__main__":
    main()
