"""Commands side by side: what is left when they are stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

JOBS = """
import sys
from fedspine.processes import Job, run_jobs
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
run_jobs([Job(str(k), lambda: sleep, lambda: None, lambda well: None) for k in range(3)], 2)
"""


def test_a_terminated_process_takes_its_jobs_with_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", JOBS], stderr=subprocess.PIPE) as process:
        own = psutil.Process(process.pid)
        while len(children := own.children()) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(children, timeout=10)[1]
