"""Populations from files of others: what they become, what is refused, and that runs follow them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedspine
from fedspine.config import RunConfig
from fedspine.controller.cohort import gather
from fedspine.devices.clock import absent, device_state, type_indices, type_names
from fedspine.devices.population import POPULATIONS, load_device, load_population
from fedspine.errors import FederationError, PopulationError
from tests.small_run import KEYS, write_data, write_model

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
CAPACITY = {"1": {"computation": 150.0, "communication": 2000.0}, "2": {"computation": 30, "communication": 16000}}
PHONES = [
    {"Model": "Fast", "RAM": "8GB", "CPU_F_AI_Score": "3000", "AI_Score": " 9 1,6"},
    {"Model": "Slow", "RAM": "0.5GB", "CPU_F_AI_Score": "200", "AI_Score": ""},
]
DAY = 86_400
AVAILABILITY = {
    "1": {"active": [0], "inactive": [DAY], "finish_time": DAY, "model": "always"},
    "2": {"active": [0, 7200], "inactive": [3600, 9000], "finish_time": DAY, "model": "seldom"},
}
TRACES = [{"name": "tram", "split": "test", "dt_s": 1.0, "mbps": [1.0, 2.0, 3.0, 4.0] * 30}]

Write = Callable[[str, object], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A file of a value as JSON, or of a list as JSON lines."""

    def write(name: str, value: object) -> str:
        rows = value if name.endswith("jsonl") and isinstance(value, list) else [value]
        lines = [json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_fedscale_capacity_is_rate_and_link(write: Write) -> None:
    population = load_population(write("capacity.json", CAPACITY), 4)
    assert [(kind.name, kind.count, kind.gflops) for kind in population.types] == [
        ("client 1", 2, 4.0),
        ("client 2", 2, 20.0),
    ]
    for device in range(4):
        first, later = (device_state(population, 0, device, round) for round in (1, 9))
        assert first == later  # the files know no noise
        mbps = 2.0 if first.type_name == "client 1" else 16.0
        assert first.download_bytes_per_second == first.upload_bytes_per_second == mbps * 1e6 / 8


def test_a_table_of_phones_is_drawn_from_by_seed(write: Write) -> None:
    file = write("phones.json", PHONES)
    fast, slow = load_population(file, 2).types
    assert (fast.name, fast.gflops, fast.memory_mb) == ("Fast", 3.0, 4800.0)
    assert (slow.name, slow.gflops, slow.memory_mb) == ("Slow", 0.2, 300.0)
    assert {load_population(file, 1, seed).types[0].name for seed in range(8)} == {"Fast", "Slow"}
    assert load_population(file, 1, 5) == load_population(file, 1, 5)
    assert load_population(file, 7).devices == 7
    with pytest.raises(PopulationError, match=r"it holds 2 types \(Fast, Slow\), and one is needed"):
        load_device(file)


def test_bandwidth_follows_the_trace(write: Write) -> None:
    population = load_population(f"jetson-80,{write('traces.jsonl', TRACES)}", 80)
    assert population.types == POPULATIONS["jetson-80"].types
    state = device_state(population, 0, 3, 1)
    assert 1e6 / 8 <= state.download_bytes_per_second <= 4e6 / 8
    assert state.upload_bytes_per_second == state.download_bytes_per_second / 2
    longer = [{**TRACES[0], "mbps": np.linspace(1, 9, 5000).tolist()}]
    population = load_population(f"jetson-80,{write('long.jsonl', longer)}", 80)
    rates = [device_state(population, 0, 3, round).download_bytes_per_second for round in (1, 2, 3)]
    steps = np.diff(rates)
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)  # a minute further with every round
    assert steps[0] == pytest.approx(60 * 8 / 4999 * 1e6 / 8, rel=1e-3)
    others = {device_state(population, 0, device, 1).download_bytes_per_second for device in range(10)}
    assert len(others) == 10
    assert (
        device_state(population, 0, 3, 1).flops_per_second
        == device_state(load_population("jetson-80", 80), 0, 3, 1).flops_per_second
    )


def test_devices_that_are_away_are_not_sampled(write: Write, tmp_path: Path) -> None:
    file = f"jetson-80,{write('availability.json', AVAILABILITY)}"
    population = load_population(file, 40)
    calendars = population.availability.calendars(0, 40)  # type: ignore[union-attr]
    assert (calendars.dtype, set(calendars)) == (np.uint8, {0, 1})
    seldom = np.flatnonzero(calendars == 1)
    hours = [absent(population, 0, 3600 * hour) for hour in range(24)]
    assert all(len(away) == 0 or np.array_equal(away, seldom) for away in hours)
    assert 1 <= sum(len(away) == 0 for away in hours) <= 3
    np.testing.assert_array_equal(absent(population, 0, 5 * DAY), hours[0])
    config = RunConfig.from_values({"devices": 40, "sampled": 30, "quorum": 1.0, "population": file})
    clock = next(3600.0 * hour for hour, away in enumerate(hours) if len(away))
    away, waited = gather(config, clock, set(), lambda now: absent(population, 0, now))
    assert (len(away), len(absent(population, 0, clock + waited))) == (0, 0)
    assert 0 < waited < DAY
    assert len(absent(population, 0, clock + waited - 60))
    with pytest.raises(FederationError, match=r"quorum = 1\.0: in two weeks there are never 30 of 40"):
        gather(config, 0.0, set(), lambda _: np.arange(20))
    keys = {"devices": 40, "sampled": 10, "rounds": 6, "population": file}
    lines = []
    for name in ("a", "b"):
        fedspine.schedule(out=tmp_path / name, **keys)
        lines.append((tmp_path / name / "schedule.jsonl").read_text())
    assert lines[0] == lines[1]


def test_a_run_waits_for_enough_devices(write: Write, tmp_path: Path) -> None:
    file = f"jetson-80,{write('availability.json', {'1': AVAILABILITY['2']})}"
    folders = {"model": str(write_model(tmp_path / "model")), "data": str(write_data(tmp_path / "data"))}
    run = fedspine.simulate(out=tmp_path / "run", **{**KEYS, **folders, "rounds": 2, "population": file})
    population = load_population(file, KEYS["devices"])
    clock = 0.0
    for record in run.records:
        slowest = max(pull.seconds for pull in record.pulls)
        waited = record.round_seconds - slowest
        assert not len(absent(population, 0, clock + waited))
        assert waited == pytest.approx(0) or len(absent(population, 0, clock))
        assert record.clock_seconds == pytest.approx(clock + waited + slowest)
        clock = record.clock_seconds
    assert clock > 3600  # of seed 0


BAD = {
    "column": ("c.json", {"1": {"computation": 3.0}}, "entry '1': communication is missing; FedScale capacity has"),
    "value": ("c.json", {"1": {"computation": 0, "communication": 9}}, "entry '1': computation = 0 must be a number"),
    "score": ("p.json", [{**PHONES[0], "CPU_F_AI_Score": "-"}], "entry 0: CPU_F_AI_Score = '-' must be a number"),
    "memory": ("p.json", [PHONES[0], {**PHONES[1], "RAM": "much"}], "entry 1: RAM = 'much' must be a size"),
    "turns": ("a.json", {"7": {**AVAILABILITY["2"], "inactive": [3600]}}, "entry '7': active and inactive must take"),
    "period": ("a.json", {"7": {**AVAILABILITY["2"], "finish_time": "x"}}, "entry '7': finish_time = 'x' must be"),
    "trace": ("t.jsonl", [{**TRACES[0], "mbps": [0, 0]}], "entry 0: mbps must hold numbers of at least 0"),
    "trace of words": ("t.jsonl", [*TRACES, {**TRACES[0], "mbps": "1,2"}], "entry 1: mbps must be a list of numbers"),
    "step": (
        "t.jsonl",
        [{"name": "x", "mbps": [1]}],
        "entry 0: dt_s is missing; bandwidth traces has name, mbps, dt_s",
    ),
    "nothing known": ("n.json", {"Fast": 3000}, r"JSON of no known kind; known are.*FedScale capacity \(computation"),
    "empty": ("n.json", [], "JSON of no known kind"),
}


@pytest.mark.parametrize(("name", "value", "message"), BAD.values(), ids=BAD)
def test_what_a_file_lacks_is_named(write: Write, name: str, value: object, message: str) -> None:
    with pytest.raises(PopulationError, match=message):
        load_population(f"jetson-80,{write(name, value)}", 8)


def test_one_file_says_what_devices_compute(write: Write) -> None:
    traces, capacity = write("t.jsonl", TRACES), write("c.json", CAPACITY)
    for name, count in (
        (traces, "0 say"),
        (f"jetson-80,{capacity}", "2 say"),
        (f"{capacity},{traces},{traces}", "2 hold"),
    ):
        with pytest.raises(PopulationError, match=f"{count}.*give one catalogue and at most one of each other"):
            load_population(name, 8)
    with pytest.raises(PopulationError, match="population = 'nowhere': neither a file nor"):
        load_population("jetson-80,nowhere", 8)


def test_many_types_are_named_by_thirds(write: Write) -> None:
    many = {str(n): {"computation": 10.0 + n, "communication": 5000.0} for n in range(9)}
    population = load_population(write("c.json", many), 9)
    names = type_names(population, 0)
    assert {name: names.count(name) for name in names} == dict.fromkeys(
        ("slowest third", "middle third", "fastest third"), 3
    )
    slowest = names.index("slowest third")
    assert population.types[type_indices(population, 0)[slowest]].gflops < 37.6


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder with device traces is absent")
def test_the_real_files(tmp_path: Path) -> None:
    capacity = SHARED / "fedscale_devices/capacity_100.json"
    availability = SHARED / "fedscale_devices/availability_100.json"
    traces, phones = SHARED / "net_norway3g/traces.jsonl", SHARED / "ai_benchmark/ai_benchmark_list.json"
    population = load_population(f"{capacity},{availability},{traces}", 1000)
    assert (len(population.types), population.devices) == (100, 1000)
    assert len(population.traces.mbps) == 210  # type: ignore[union-attr]
    assert 100 < len(absent(population, 0, 0.0)) < 700
    quick = replace(load_population(str(phones), 333), traces=population.traces)
    assert len(quick.types) == 333
    assert 0.1 < min(kind.gflops for kind in quick.types) < max(kind.gflops for kind in quick.types) < 5
    rates = [8e-6 * device_state(quick, 0, device, 1).download_bytes_per_second for device in range(333)]
    assert 0.5 < np.median(rates) < 3
    run = fedspine.schedule(
        out=tmp_path / "run", devices=1000, sampled=20, rounds=5, population=f"{capacity},{availability},{traces}"
    )
    assert run.summary["bytes_per_idle_device"] == 6
