"""The images and the compose file: what the parts promise one another, and a federation of its very commands."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedspine.certificates import make_certificates
from fedspine.cli import _parser
from fedspine.devices.population import load_device
from tests.flower.test_ray import free_ports
from tests.small_run import KEYS, rounds, write_data, write_model

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
CLIENTS = ["client-1", "client-2", "client-3", "client-4"]
PROGRAMS_BYTES = 1e9
"""Of a device's limit, for Python, PyTorch and Flower."""

_spec = importlib.util.spec_from_file_location("run_locally", DOCKER / "run_locally.py")
assert _spec is not None
assert _spec.loader is not None
run_locally = importlib.util.module_from_spec(_spec)
sys.modules["run_locally"] = run_locally
_spec.loader.exec_module(run_locally)

TEXT = (DOCKER / "compose.yaml").read_text(encoding="utf-8")


def compose(**variables: str) -> Any:
    return run_locally.interpolated(yaml.safe_load(TEXT), variables)


def test_variables_are_replaced_as_compose_does_it() -> None:
    text = "${A}/${A:-b} ${A:+--data /a} ${B:-./b}/c"
    assert run_locally.interpolated({"x": [text, 1]}, {"A": "a"}) == {"x": ["a/a --data /a ./b/c", 1]}
    assert run_locally.interpolated(text, {}) == "/b  ./b/c"
    head = TEXT.partition("name: fedspine")[0]
    assert set(re.findall(r"FEDSPINE_\w+", TEXT)) == set(re.findall(r"^# (FEDSPINE_\w+) ", head, re.M))


@pytest.mark.parametrize("variables", [{}, {"FEDSPINE_DATA": "/rows"}, {"FEDSPINE_SERVE": "--resume /runs/first"}])
def test_every_command_is_one_of_fedspine(variables: dict[str, str]) -> None:
    for name, service in compose(**variables)["services"].items():
        program, *arguments = shlex.split(service["command"])
        options = vars(_parser().parse_args(arguments))
        assert program == "fedspine"
        mounted = {volume.split(":")[1] for volume in service["volumes"]}
        assert {str(options["state"]), "/models"} <= mounted
        if name != "server":
            assert options["name"] == name
            assert (str(options["data"]) == "/data") is ("FEDSPINE_DATA" in variables)


def test_nobody_has_a_key_that_is_not_its_own() -> None:
    file = compose()
    held = {name: set(service["secrets"]) for name, service in file["services"].items()}
    assert held.pop("server") == {"ca.crt", "server.crt", "server.key", *(f"{name}.pub" for name in CLIENTS)}
    assert held == {name: {"ca.crt", f"{name}.key"} for name in CLIENTS}
    assert {name: secret["file"] for name, secret in file["secrets"].items()} == {
        name: f"./certificates/{name}" for name in file["secrets"]
    }
    assert tomllib.loads((DOCKER / "run.toml").read_text(encoding="utf-8"))["devices"] == len(CLIENTS)


def test_a_profile_is_what_the_limit_leaves() -> None:
    limits = []
    for service in (compose()["services"][name] for name in CLIENTS):
        limit = int(service["mem_limit"][:-1]) * run_locally.UNITS[service["mem_limit"][-1]]
        profile = _parser().parse_args(shlex.split(service["command"])[1:]).device
        usable = load_device(str(DOCKER / profile.removeprefix("/"))).types[0].memory_mb * 1e6
        assert 0.9 * limit < usable + PROGRAMS_BYTES <= limit
        assert service["memswap_limit"] == service["mem_limit"]
        limits.append(limit)
    assert limits == sorted(set(limits))


def test_the_image_has_what_the_compose_file_takes() -> None:
    (image,) = re.findall(r"^HEALTHCHECK (.*) CMD (\[.*\])$", DOCKERFILE, re.M)
    for service in compose()["services"].values():
        check = service["healthcheck"]
        said = f"--interval={check['interval']} --timeout={check['timeout']} --start-period={check['start_period']}"
        assert image == (f"{said} --retries={check['retries']}", json.dumps(check["test"][1:]))
        assert f"AS {service['build']['target']}\n" in DOCKERFILE
        assert {*service["build"]["args"]} <= {*re.findall(r"^ARG (\w+)=", DOCKERFILE, re.M)}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M) for word in line.split()}
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def local(base: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(DOCKER / "run_locally.py"), "--under", str(base / "under")]
    return subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, timeout=1200)


def test_keys_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    result = local(tmp_path, FEDSPINE_CERTIFICATES=str(tmp_path), FEDSPINE_DATA=str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"run_locally: error: {tmp_path}/ca.crt: a secret of the compose file")
    assert result.stderr.count("\n") == 1


@pytest.mark.runtime
def test_the_services_run_to_the_end(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certificates", ["server"], CLIENTS)
    for name in CLIENTS:
        write_data(tmp_path / "rows" / name, train=24, dev=8)
    small = {"devices": 4, "sampled": 2, "rounds": 1, "probe": "never", "eval_devices": 1}
    keys = {**KEYS, **small, "model": str(write_model(tmp_path / "model")), "data": str(write_data(tmp_path / "data"))}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in keys.items()]
    (tmp_path / "run.toml").write_text("".join(lines), encoding="utf-8")
    result = local(
        tmp_path,
        FEDSPINE_CONFIG=str(tmp_path / "run.toml"),
        FEDSPINE_CERTIFICATES=str(tmp_path / "certificates"),
        FEDSPINE_DATA=str(tmp_path / "rows"),
        FEDSPINE_PORT=str(free_ports(1)[0]),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    directory = tmp_path / "under" / "volumes" / "runs" / "first"
    (record,) = rounds(directory)
    assert [pull["report"]["outcome"] for pull in record["pulls"]] == ["trained", "trained"]
    assert [pull["report"]["examples"] for pull in record["pulls"]] == [24, 24]  # its own
    for name in ("server", *CLIENTS):
        assert re.search(rf"^{name} +\| healthy: up: the SuperLink answered", result.stdout, re.M), result.stdout
        assert re.search(rf"^{name} +\| stopped, exit code", result.stdout, re.M)
    assert f"{directory}/summary.json:\n" in result.stdout
