"""The device catalogue: what is built in, what a file may say, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedspine.devices import population as catalogue
from fedspine.devices.clock import device_state
from fedspine.devices.population import POPULATIONS, DeviceType, Population, load_population
from fedspine.errors import PopulationError

TYPES = """
[[types]]
name = "Fast"
count = 3
gflops = 1500
modes = [1.0, 0.5]
memory_mb = 8000
iteration_ms = 2

[[types]]
name = "Slow"
count = 1
gflops = 300.5
memory_mb = 4000
"""
LINKS = "download_mbps = [10, 4.5]\nupload_mbps = [5, 2]\n"


def written(folder: Path, text: str) -> str:
    path = folder / "devices.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", POPULATIONS)
def test_built_in_catalogues_are_the_testbed_of_the_paper(name: str) -> None:
    population = load_population(name, 80)
    assert population == POPULATIONS[name]
    assert population.devices == 80
    assert [(kind.name, kind.count) for kind in population.types] == [
        ("Jetson TX2", 30),
        ("Xavier NX", 40),
        ("AGX Xavier", 10),
    ]
    for kind in population.types:
        assert max(kind.modes) == 1.0
        assert min(kind.modes) > 0


@pytest.mark.parametrize("devices", [1, 4, 7, 81, 1000])
def test_counts_scale_by_largest_remainder(devices: int) -> None:
    population = load_population("jetson-80", devices)
    assert population.devices == devices
    for kind, scaled in zip(POPULATIONS["jetson-80"].types, population.types, strict=True):
        assert abs(scaled.count - kind.count * devices / 80) < 1
    assert [kind.count for kind in load_population("jetson-80", 4).types] == [2, 2, 0]  # of 1.5, 2 and 0.5


def test_a_file_with_all_keys(tmp_path: Path) -> None:
    text = "mode_rounds = 5\njitter = 0\nbandwidth_sigma = 0.1\nlatency_ms = 7\n" + LINKS + TYPES
    assert load_population(written(tmp_path, text), 8) == Population(
        types=(
            DeviceType("Fast", 6, 1500.0, (1.0, 0.5), 8000.0, 2.0),
            DeviceType("Slow", 2, 300.5, (1.0,), 4000.0, 3.0),
        ),
        download_mbps=(10.0, 4.5),
        upload_mbps=(5.0, 2.0),
        bandwidth_sigma=0.1,
        mode_rounds=5,
        jitter=0.0,
        latency_ms=7.0,
    )


def test_a_file_without_what_may_be_left_out(tmp_path: Path) -> None:
    population = load_population(written(tmp_path, LINKS + TYPES), 4)
    built_in = POPULATIONS["jetson-80"]
    for name in ("bandwidth_sigma", "mode_rounds", "jitter", "latency_ms"):
        assert getattr(population, name) == getattr(built_in, name)
    names = {device_state(population, 0, device, 1).type_name for device in range(4)}
    assert names == {"Fast", "Slow"}


def test_the_example_of_the_documentation_works(tmp_path: Path) -> None:
    text = (catalogue.__doc__ or "").split("TOML file:\n")[1]
    loaded = load_population(written(tmp_path, text), 30)
    assert loaded.types == (DeviceType("Jetson TX2", 30, 330.0, (1.0, 0.86, 0.65), 8000.0, 4.0),)
    assert loaded.download_mbps == (28.0, 18.0, 10.0, 4.0)


BAD_FILES = {
    "no types": (LINKS, "at least one"),
    "types is no list": (LINKS + "[types]\nname = 'Fast'", "at least one"),
    "types is a list of numbers": (LINKS + "types = [1]", r"types\[0\].*table"),
    "no links": (TYPES, "download_mbps"),
    "links are a number": ("download_mbps = 10\nupload_mbps = [5]" + TYPES, "download_mbps"),
    "links are empty": ("download_mbps = [10]\nupload_mbps = []" + TYPES, "upload_mbps"),
    "a link is a text": ("download_mbps = [10, 'x']\nupload_mbps = [5, 2]" + TYPES, "download_mbps = 'x'"),
    "a link is zero": ("download_mbps = [10, 4]\nupload_mbps = [5, 0]" + TYPES, "upload_mbps = 0"),
    "unequal groups": ("download_mbps = [10, 4]\nupload_mbps = [5]" + TYPES, "download_mbps has 2.*upload_mbps 1"),
    "unknown key": ("jiter = 0.1\n" + LINKS + TYPES, "'jiter'.*jitter"),
    "unknown key of a type": (LINKS + TYPES + "flops = 3", r"types\[1\].*'flops'.*gflops"),
    "name missing": (LINKS + TYPES.replace('name = "Fast"', ""), r"types\[0\].*name"),
    "name is a number": (LINKS + TYPES.replace('"Fast"', "7"), r"types\[0\].*name"),
    "count missing": (LINKS + TYPES.replace("count = 3", ""), r"types\[0\] \(Fast\).*count is missing"),
    "count is zero": (LINKS + TYPES.replace("count = 3", "count = 0"), r"Fast.*count = 0"),
    "count is a part": (LINKS + TYPES.replace("count = 3", "count = 0.5"), r"Fast.*count = 0\.5"),
    "count is endless": (LINKS + TYPES.replace("count = 3", "count = inf"), "Fast.*count = inf"),
    "gflops missing": (LINKS + TYPES.replace("gflops = 1500", ""), "Fast.*gflops is missing"),
    "gflops below zero": (LINKS + TYPES.replace("1500", "-1500"), "Fast.*gflops = -1500"),
    "gflops is a truth": (LINKS + TYPES.replace("1500", "true"), "Fast.*gflops = True"),
    "gflops is no number": (LINKS + TYPES.replace("1500", "nan"), "Fast.*gflops = nan"),
    "modes are a number": (LINKS + TYPES.replace("[1.0, 0.5]", "1.0"), "Fast.*modes"),
    "a mode is zero": (LINKS + TYPES.replace("[1.0, 0.5]", "[1.0, 0]"), "Fast.*modes = 0"),
    "memory missing": (LINKS + TYPES.replace("memory_mb = 4000", ""), "Slow.*memory_mb is missing"),
    "iteration below zero": (LINKS + TYPES.replace("iteration_ms = 2", "iteration_ms = -2"), "iteration_ms = -2"),
    "jitter below zero": ("jitter = -0.1\n" + LINKS + TYPES, r"jitter = -0\.1 must be at least 0"),
    "jitter is endless": ("jitter = inf\n" + LINKS + TYPES, "jitter = inf"),
    "sigma is a text": ("bandwidth_sigma = 'much'\n" + LINKS + TYPES, "bandwidth_sigma = 'much'"),
    "latency below zero": ("latency_ms = -1\n" + LINKS + TYPES, "latency_ms = -1"),
    "no rounds of a mode": ("mode_rounds = 0\n" + LINKS + TYPES, "mode_rounds = 0 must be above 0"),
    "part of a round": ("mode_rounds = 0.5\n" + LINKS + TYPES, r"mode_rounds = 0\.5"),
    "no TOML": ("download_mbps = [10", "not valid TOML"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PopulationError, match=rf"devices\.toml'.*{message}"):
        load_population(written(tmp_path, text), 8)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PopulationError, match="not valid TOML"):
        load_population(str(path), 8)


@pytest.mark.parametrize("name", ["jetson-81", "", "nowhere/devices.toml", "."])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(PopulationError, match=r"neither a file nor.*jetson-80.*jetson-80-communication-bound"):
        load_population(name, 8)
