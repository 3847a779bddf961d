"""Real processes that are killed, or too slow, in the middle of a run: it goes on without them, and with them again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fedspine.certificates import make_certificates
from fedspine.config import RunConfig
from fedspine.lora.adapters import narrow
from fedspine.methods import PLAIN
from fedspine.structure import Structure
from fedspine.training import evaluate
from fedspine.types import FAILED, TRAINED
from fedspine.workbench import workbench
from tests.flower.processes import ROOT, SECONDS, Start, kill, machines, slowed, until, worker
from tests.flower.test_ray import free_ports
from tests.small_run import KEYS, options, write_data, write_model

pytestmark = pytest.mark.runtime
SST2 = ROOT.parent / "shared" / "data" / "sst2"
NAMES = "abcde"
TRAINING = "Receiving: train message"
"""What a device says of a message; a process that answers it is there already."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("faults")
    write_model(base / "model")
    write_data(base / "data")
    make_certificates(base / "three", ["127.0.0.1"], list(NAMES[:3]))
    make_certificates(base / "five", ["127.0.0.1"], list(NAMES))
    return base


@pytest.fixture
def start(base: Path) -> Iterator[Start]:
    with machines(base) as start:
        yield start


def lines(directory: Path) -> list[bytes]:
    """Of rounds.jsonl, the whole ones."""
    path = directory / "rounds.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(directory)]


def outcomes(record: dict[str, Any]) -> dict[str, str]:
    """By name of the device."""
    return {NAMES[pull["device"]]: pull["report"]["outcome"] for pull in record["pulls"]}


def test_a_killed_server_and_a_killed_device_find_one_another_again(base: Path, start: Start) -> None:
    (port,) = free_ports(1)
    keys = KEYS | {"model": str(base / "model"), "data": str(base / "data"), "devices": 3, "sampled": 3}
    place = ["--certificates", "three", "--host", "127.0.0.1", "--port", port, "--state", "again"]
    joining = ["--server", f"127.0.0.1:{port}", "--certificates", "three", "--name", "a", "--state", "again-a"]
    serving = ("serve", *options(keys), *place, "--out", "never")
    server = start(*serving)
    until(server, "0 of 3 devices joined; missing: a, b, c")
    device = start("join", *joining)
    until(server, "1 of 3 devices joined; missing: b, c")
    kill(server)
    server = start(*serving)
    until(server, "1 of 3 devices joined; missing: b, c")  # the device was not touched
    (supernode,) = psutil.Process(device.pid).children()
    supernode.kill()
    _, err = device.communicate(timeout=SECONDS)
    assert (device.returncode, "the SuperNode of a ended" in err) == (2, True), err
    device = start("join", *joining)
    until(device, "SuperNode ID: ")  # at once refused, if it is quick, because the server holds it for joined still
    assert not (base / "never").exists()


def test_a_late_device_is_left_out_and_a_killed_server_goes_on(base: Path, start: Start) -> None:
    (port,) = free_ports(1)
    keys = KEYS | {"model": str(base / "model"), "data": str(base / "data"), "devices": 3, "sampled": 3, "rounds": 3}
    keys |= {"probe": "never", "deadline_seconds": 40}
    place = ["--certificates", "three", "--host", "127.0.0.1", "--port", port, "--state", "link"]
    server = start("serve", *options(keys), *place, "--out", "late")
    until(server, "0 of 3 devices joined")
    joining = ["--server", f"127.0.0.1:{port}", "--certificates", "three"]
    devices = [start("join", *joining, "--name", name, "--state", f"late-{name}") for name in NAMES[:3]]

    until(devices[2], TRAINING)
    with slowed(worker(devices[2])):
        until(server, "round 1 of 3: 2 of 3 devices trained")
        until(devices[0], TRAINING)
        until(devices[0], TRAINING)  # at work in round 2
        before = lines(base / "late")
        kill(server)
    (first,) = records(base / "late")
    assert outcomes(first) == {"a": TRAINED, "b": TRAINED, "c": FAILED}
    assert first["pulls"][2]["report"]["message"] == "no reply within 40 s"

    again = start("serve", *place, "--resume", "late")
    _, err = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, err
    assert lines(base / "late")[:1] == before
    _, second, third = records(base / "late")
    # One that does not know yet that its old work is of no use to anybody is asked in the next round.
    assert sorted([*outcomes(second), *(NAMES[device] for device in second["away"])]) == list("abc")
    assert set(outcomes(second).values()) == {TRAINED}, (second["pulls"], err)
    assert outcomes(third) == dict.fromkeys("abc", TRAINED)
    assert all(device.poll() is None for device in devices)  # they found the new server by themselves


def test_a_device_dies_and_another_comes(base: Path, start: Start) -> None:
    if not SST2.is_dir():
        pytest.skip(f"needs SST-2 in {SST2}")
    (port,) = free_ports(1)
    keys: dict[str, Any] = {
        **PLAIN,
        "data": str(SST2),
        "devices": 5,
        "sampled": 4,
        "rounds": 3,
        "partition": "iid",
        "probe": "never",
    }
    keys |= {"local_iterations": 20, "target_sparsity": 0.2, "eval_examples": 200, "eval_devices": 1, "eval_every": 3}
    place = ["--certificates", "five", "--host", "127.0.0.1", "--port", port, "--state", "sst2"]
    server = start("serve", *options(keys), *place, "--out", "died", "--wait-for", 4)
    until(server, "0 of 5 devices joined")

    def device(name: str) -> subprocess.Popen[str]:
        joining = ["--server", f"127.0.0.1:{port}", "--certificates", "five"]
        return start("join", *joining, "--name", name, "--state", f"sst2-{name}")

    devices = {name: device(name) for name in "abcd"}
    until(devices["d"], TRAINING)
    until(devices["d"], TRAINING)
    with slowed(worker(devices["d"])):  # round 2 lasts until the new one is there
        until(device("e"), "SuperNode ID: ")
    kill(devices["d"])
    _, err = server.communicate(timeout=SECONDS)
    assert server.returncode == 0, err
    first, second, third = records(base / "died")
    assert outcomes(first) == dict.fromkeys("abcd", TRAINED)
    assert outcomes(second) == {**dict.fromkeys("abc", TRAINED), "d": FAILED}
    assert outcomes(third) == dict.fromkeys("abce", TRAINED)
    assert (first["away"], third["away"]) == ([4], [3])

    bench = workbench(RunConfig.from_values(keys).to_json())
    full = Structure.full(bench.shape)
    bench.resident.mount(full, narrow(bench.start, full, bench.config.max_rank, bench.shape), merge=True)
    untrained, _, _ = evaluate(bench.resident, bench.evaluation_batches(bench.test))
    assert third["accuracy"] > untrained + 0.05
    assert np.isfinite(third["loss"])
