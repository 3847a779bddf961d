"""A federation of real processes on this machine: TLS, node authentication, and the bits of the simulation."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from safetensors.numpy import load_file

from fedspine.certificates import make_certificates
from fedspine.devices.measured import LINK_VARIABLE
from fedspine.flower.superlink import flower_environment
from fedspine.flower.supernode import Device, supernode_command
from fedspine.health import last_answer_seconds
from fedspine.processes import program
from fedspine.simulation import simulate
from tests.flower.processes import ROOT, SECONDS, Start, machines, until
from tests.flower.test_ray import free_ports
from tests.small_run import KEYS, figures, options, rounds, write_data, write_model

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("deployment")
    write_model(base / "model")
    write_data(base / "data")
    make_certificates(base / "certificates", ["127.0.0.1"], ["a", "b", "c", "d"])
    make_certificates(base / "strange", ["127.0.0.1"], ["a"])
    (base / "strange" / "ca.crt").write_bytes((base / "certificates" / "ca.crt").read_bytes())
    return base


@pytest.fixture
def start(base: Path) -> Iterator[Start]:
    with machines(base) as start:
        yield start


def keys(base: Path, **changes: Any) -> dict[str, Any]:
    return {**KEYS, "model": str(base / "model"), "data": str(base / "data"), **changes}


def test_real_devices_give_the_bits_of_the_simulation(base: Path, start: Start) -> None:
    chosen = keys(base, devices=4, sampled=2, rounds=3, probe="never", eval_devices=2, wire_dtype="float16")
    (port,) = free_ports(1)
    place = ["--host", "127.0.0.1", "--port", port, "--state", "superlink"]
    secured = ["--certificates", "certificates"]
    server = start("serve", *options(chosen), *secured, *place, "--out", "real")
    until(server, "0 of 4 devices joined; missing: a, b, c, d")

    def device(name: str, *trust: object) -> subprocess.Popen[str]:
        return start("join", "--server", f"127.0.0.1:{port}", "--name", name, "--state", f"state-{name}", *trust)

    for trust, words in (
        (("--certificates", "strange"), f"the server at 127.0.0.1:{port} refuses it: it does not know the key"),
        (("--insecure",), "it speaks TLS only; join with --certificates"),
    ):
        refused = device("a", *trust)
        _, err = refused.communicate(timeout=120)
        assert (refused.returncode, words in err) == (2, True), err

    devices = [device(name, *secured) for name in "abcd"]
    out, err = server.communicate(timeout=SECONDS)
    assert (server.returncode, out) == (0, "real\n"), err
    assert "round 3 of 3: 2 of 2 devices trained" in err
    assert all(each.poll() is None for each in devices)  # they stay for the next run

    simulated = simulate(**chosen, out=base / "simulated")
    assert rounds(base / "real") == rounds(simulated.directory)
    assert figures(base / "real") == figures(simulated.directory)
    real, same = (load_file(path / "checkpoint" / "state.safetensors") for path in (base / "real", simulated.directory))
    assert real.keys() == same.keys()
    assert all(np.array_equal(real[name], same[name]) for name in real)

    (base / "certificates" / "d.pub").unlink()
    make_certificates(base / "certificates", [], ["e"])
    again = start("serve", *options({**chosen, "rounds": 1}), *secured, *place, "--out", "again")
    _, err = devices.pop().communicate(timeout=SECONDS)  # it tries for a while, and the server waits for e
    assert "the server at 127.0.0.1" in err.splitlines()[-1]
    assert "refuses it: it does not know the key" in err.splitlines()[-1]
    devices.append(device("e", *secured))
    _, err = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, err
    assert all(each.poll() is None for each in devices)


def test_devices_with_their_own_data_and_clock(base: Path, start: Start) -> None:
    rows = [f"good film {'and' if i % 3 else 'very'}\tgood\nbad film\tbad" for i in range(15)]
    (base / "own.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    chosen = keys(base, devices=2, sampled=2, rounds=1, cost="measured", eval_devices=1)
    (port,) = free_ports(1)
    place = ["--host", "127.0.0.1", "--port", port, "--state", "plain"]
    server = start("serve", *options(chosen), "--insecure", *place, "--out", "measured")
    until(server, "0 of 2 devices joined")
    joining = ["--server", f"127.0.0.1:{port}", "--insecure"]
    start("join", *joining, "--name", "a", "--data", "own.tsv", "--device", "measure", "--state", "plain-a")
    start("join", *joining, "--name", "b", "--state", "plain-b")
    _, err = server.communicate(timeout=SECONDS)
    assert server.returncode == 0, err
    (record,) = [json.loads(line) for line in (base / "measured" / "rounds.jsonl").read_text().splitlines()]
    reports = [pull["report"] for pull in record["pulls"]]
    assert [report["examples"] for report in reports] == [27, 60]
    for pull in record["pulls"]:
        report = pull["report"]
        assert 0 < report["compute_seconds"] <= report["wall"]["seconds"] + 1
        assert min(report["download_seconds"], report["upload_seconds"]) > 0
        assert min(pull["probe"]["seconds_per_flop"], pull["probe"]["seconds_per_byte"]) > 0
        assert report["peak_memory_bytes"] > 50e6
    assert record["clock_seconds"] == record["round_seconds"] > max(report["compute_seconds"] for report in reports)


class Failing(BaseHTTPRequestHandler):
    """A SuperLink that accepts a device and fails after its first heartbeat."""

    heard = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if "/send-node-heartbeat" in self.path:
            self.heard.set()
        if "/pull-messages" in self.path:
            self.heard.wait(20)
        content = ActivateNodeResponse(node_id=7).SerializeToString() if "/activate-node" in self.path else b""
        self.send_response(500 if "/pull-messages" in self.path else 200)
        self.send_header("content-type", PROTOBUF_MEDIA_TYPE)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def test_a_supernode_ends_when_its_server_fails(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    device = Device(f"127.0.0.1:{server.server_port}", "a", tmp_path)
    environment = flower_environment(tmp_path) | {LINK_VARIABLE: str(tmp_path / "link.json"), "PYTHONPATH": str(ROOT)}
    with program(supernode_command(device), env=environment) as process:
        assert process.wait(120) == 0
    assert last_answer_seconds(tmp_path) < 60
    server.shutdown()
