"""How a cluster is divided among workers, and what is said when there is none."""

import socket
import time
from pathlib import Path

import pytest

from fedspine.cli import main
from fedspine.errors import ConfigError, FederationError
from fedspine.flower import cluster
from fedspine.flower.cluster import Division, divide, find_cluster
from fedspine.simulation import simulate


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([(4, 0)], 4, Division(4, 1.0, 0.0)),
        ([(4, 0), (2, 0)], None, Division(6, 1.0, 0.0)),
        ([(8, 0), (8, 0)], 6, Division(6, 2.6666, 0.0)),
        ([(8, 0), (8, 0)], 5, Division(4, 4.0, 0.0)),
        ([(8, 0), (2, 0)], 1, Division(1, 8.0, 0.0)),
        ([(8, 0)], 100, Division(8, 1.0, 0.0)),
        ([(16, 1)], None, Division(16, 1.0, 0.0625)),
        ([(16, 3)], 16, Division(16, 1.0, 0.1666)),  # six on a GPU
        ([(16, 8)], 3, Division(3, 5.3333, 1.0)),
        ([(4, 1), (8, 4)], None, Division(12, 1.0, 0.25)),
    ],
)
def test_every_worker_finds_its_share(
    nodes: list[tuple[float, float]], workers: int | None, expected: Division
) -> None:
    division = divide(nodes, workers)
    assert division == expected
    assert sum(int(cpus / division.cpus) for cpus, _ in nodes) == division.workers
    if division.gpus:
        per_gpu = int(1 / division.gpus)
        assert all(int(cpus / division.cpus) <= per_gpu * gpus for cpus, gpus in nodes)


def test_too_few_workers_for_equal_machines() -> None:
    with pytest.raises(ConfigError, match=r"workers = 2: .* at least 3"):
        divide([(8, 0), (8, 0), (8, 0)], 2)


def test_an_address_needs_the_ray_engine() -> None:
    with pytest.raises(ConfigError, match=r"address = '10.0.0.1:6379': .*'inline'.* engine = 'ray'"):
        simulate(address="10.0.0.1:6379")
    for wrong in ("", "auto", "ray://10.0.0.1:10001", "10.0.0.1"):
        with pytest.raises(ConfigError, match=f"address = '{wrong}': must be HOST:PORT"):
            simulate(engine="ray", address=wrong)


def test_a_relative_path_means_nothing_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reviews").mkdir()
    with pytest.raises(ConfigError, match=r"data = 'reviews': .* absolute path"):
        simulate(engine="ray", address="127.0.0.1:1", data="reviews")


def test_no_cluster_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    assert main(["simulate", "--address", address]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])
    assert err.startswith(f"fedspine: error: address = '{address}': ")
    assert "Connection refused" in err
    assert "`ray start --head --port=" in err


def test_something_else_than_ray_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(FederationError, match="no answer in 4 seconds"):
            find_cluster(f"127.0.0.1:{silent.getsockname()[1]}", None, cuda=False)
    assert time.monotonic() - began < 10
