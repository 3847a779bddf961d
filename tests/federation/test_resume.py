"""A run that is killed and continued ends as if it had not been; a directory that was tampered with is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fedspine.checkpoint import FILE, load_state, save_state
from fedspine.cli import main
from fedspine.config import load_config
from fedspine.errors import CheckpointError
from fedspine.report.observer import Silent
from fedspine.simulation import simulate
from fedspine.types import RoundRecord
from fedspine.workbench import workbench
from tests.small_run import KEYS, figures, options, rounds, write_data, write_model

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 240


class Photographer(Silent):
    """Copies the run directory after every round: what a kill at that moment would leave."""

    def __init__(self, run: Path, album: Path) -> None:
        self._run = run
        self._album = album

    def round_done(self, record: RoundRecord) -> None:
        shutil.copytree(self._run, self._album / str(record.round))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def keys(base: Path) -> dict[str, Any]:
    return {**KEYS, "model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}


@pytest.fixture(scope="module")
def whole(base: Path, keys: dict[str, Any]) -> Path:
    """The directory of a run that nobody disturbed; `album/N` beside it is its state after round N."""
    simulate(out=base / "whole", observer=Photographer(base / "whole", base / "album"), **keys)
    return base / "whole"


@pytest.fixture
def after(whole: Path, tmp_path: Path) -> Callable[[int], Path]:
    """A copy of the run as it was after a round; 0: before the first one ended."""

    def copy(round: int) -> Path:
        directory = tmp_path / "run"
        if round == 0:
            directory.mkdir()
            shutil.copy(whole / "config.toml", directory)
        else:
            shutil.copytree(whole.parent / "album" / str(round), directory)
        return directory

    return copy


def assert_same_end(directory: Path, whole: Path) -> None:
    """Records, figures and checkpoint of the undisturbed run, bit for bit, and no other files."""
    assert rounds(directory) == rounds(whole)
    assert figures(directory) == figures(whole)
    assert metadata(directory) == metadata(whole)
    mine, theirs = load_file(directory / FILE), load_file(whole / FILE)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
    assert (directory / "curves.png").is_file()


def metadata(directory: Path) -> Mapping[str, str]:
    with safe_open(directory / FILE, framework="np") as file:
        return file.metadata()


def lines(directory: Path) -> list[str]:
    path = directory / "rounds.jsonl"
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def tree(directory: Path) -> dict[str, bytes]:
    """Every file's content."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(directory: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """`--resume` says one line, exits with 2 and changes nothing."""
    before = tree(directory)
    capsys.readouterr()
    assert main(["simulate", "--resume", str(directory), "--engine", "inline"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("fedspine: error: ")
    for word in words:
        assert word in err
    assert tree(directory) == before


def kill_when(arguments: list[str], directory: Path, due: Callable[[], bool]) -> None:
    """Start `fedspine simulate` and kill it, without warning, as soon as `due` says so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedspine", "simulate", *arguments, "--engine", "inline"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while not due():
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(lines(directory)) < KEYS["rounds"]


@pytest.mark.runtime
def test_killed_three_times_it_ends_the_same(whole: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    """In round 1, after round 2 and after round 4; the last leg runs in this process."""
    directory = tmp_path / "run"
    kill_when(["--out", str(directory), *options(keys)], directory, (directory / "tensorboard").exists)
    assert len(lines(directory)) <= 1
    for count in (2, 4):
        kill_when(["--resume", str(directory)], directory, lambda count=count: len(lines(directory)) >= count)
        assert len(lines(directory)) >= count
    simulate(resume=directory)
    assert_same_end(directory, whole)


@pytest.mark.parametrize("round", [1, 3, 5, 6])
def test_continued_after_any_round_it_ends_the_same(whole: Path, after: Callable[[int], Path], round: int) -> None:
    """After the last one too, when only the final cut and the evaluation of the devices are left."""
    directory = after(round)
    assert not (directory / "summary.json").exists()
    simulate(resume=directory)
    assert_same_end(directory, whole)


def test_a_finished_run_resumes_to_the_same_end(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    run = simulate(resume=directory)
    assert_same_end(directory, whole)
    assert lines(directory) == lines(whole)
    assert len(run.records) == KEYS["rounds"]


def test_a_torn_last_line_is_left_out(whole: Path, after: Callable[[int], Path]) -> None:
    directory = after(3)
    with open(directory / "rounds.jsonl", "a", encoding="utf-8") as file:
        file.write(lines(whole)[3][:200])
    simulate(resume=directory)
    assert_same_end(directory, whole)


def test_a_round_without_its_checkpoint_is_run_again(whole: Path, after: Callable[[int], Path]) -> None:
    """Killed between the record of round 4 and its checkpoint."""
    directory = after(3)
    with open(directory / "rounds.jsonl", "a", encoding="utf-8") as file:
        file.write(lines(whole)[3])
    simulate(resume=directory)
    assert_same_end(directory, whole)


@pytest.mark.parametrize("left", ["nothing", "half a record", "a record"])
def test_a_first_round_without_a_checkpoint_is_run_again(whole: Path, after: Callable[[int], Path], left: str) -> None:
    """Killed before the first checkpoint was whole, with its temporary file beside."""
    directory = after(0)
    first = lines(whole)[0]
    text = {"nothing": "", "half a record": first[:300], "a record": first}[left]
    if text:
        (directory / "rounds.jsonl").write_text(text, encoding="utf-8")
        (directory / "checkpoint").mkdir()
        (directory / "checkpoint" / ".state.safetensors.77").write_bytes(b"half")
    simulate(resume=directory)
    assert_same_end(directory, whole)


@pytest.mark.parametrize("kept", [3, 0, None], ids=["one line short", "empty", "absent"])
def test_records_behind_their_checkpoint_are_refused(
    after: Callable[[int], Path], capsys: pytest.CaptureFixture[str], kept: int | None
) -> None:
    directory = after(4)
    text = "".join(lines(directory)[: kept or 0])
    (directory / "rounds.jsonl").unlink()
    if kept is not None:
        (directory / "rounds.jsonl").write_text(text, encoding="utf-8")
    refused(directory, capsys, f"rounds.jsonl has {kept or 0} rounds, the checkpoint 4")


def test_a_line_that_is_no_record_is_refused(after: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = after(3)
    first, _, third = lines(directory)
    (directory / "rounds.jsonl").write_text(f"{first}what?\n{third}", encoding="utf-8")
    refused(directory, capsys, "rounds.jsonl")


def test_checkpoint_of_another_configuration_is_refused(
    after: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = after(3)
    config = load_config(directory / "config.toml", {})
    state = load_state(directory, config, workbench(config.to_json()).shape)
    save_state(directory, load_config(directory / "config.toml", {"learning_rate": 0.5}), state)
    refused(directory, capsys, "belongs to another configuration: learning_rate = 0.5 there, 0.01 here")


@pytest.mark.parametrize(
    ("line", "edited", "words"),
    [
        ("rounds = 6", "rounds = 9", "rounds = 6 there, 9 here"),
        ("seed = 0", "seed = 3", "seed = 0 there, 3 here"),
        ("seed = 0", "sed = 0", "did you mean 'seed'?"),
        ("seed = 0", "seed =", "is not valid TOML"),
    ],
)
def test_an_edited_config_is_refused(
    after: Callable[[int], Path], capsys: pytest.CaptureFixture[str], line: str, edited: str, words: str
) -> None:
    directory = after(3)
    text = (directory / "config.toml").read_text(encoding="utf-8")
    assert f"\n{line}\n" in text
    (directory / "config.toml").write_text(text.replace(f"\n{line}\n", f"\n{edited}\n"), encoding="utf-8")
    refused(directory, capsys, words)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def another_file(path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, path)


def without_a_tensor(path: Path) -> None:
    with safe_open(path, framework="np") as file:
        about = file.metadata()
    tensors = load_file(path)
    del tensors["structure/consensus"]
    save_file(tensors, path, about)


def without_the_configuration(path: Path) -> None:
    with safe_open(path, framework="np") as file:
        about = file.metadata()
    save_file(load_file(path), path, {"format": about["format"]})


@pytest.mark.parametrize(
    "spoil",
    [truncated, cut_in_the_header, emptied, garbage, another_file, without_a_tensor, without_the_configuration],
)
def test_a_spoiled_checkpoint_is_refused(
    after: Callable[[int], Path], capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    directory = after(3)
    spoil(directory / FILE)
    refused(directory, capsys, str(directory / FILE))


def test_a_lost_checkpoint_is_refused(after: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """With finished rounds there was one; starting over would throw them away."""
    directory = after(3)
    (directory / FILE).unlink()
    refused(directory, capsys, "does not exist: this run has no checkpoint to continue from")


def test_python_refuses_keys_beside_resume(after: Callable[[int], Path]) -> None:
    """As the command line does: they would have no effect."""
    directory = after(3)
    before = tree(directory)
    with pytest.raises(CheckpointError, match="no run directory"):
        simulate(resume=directory.parent)
    for extra in ({"rounds": 9}, {"out": directory.parent / "new"}, {"config": directory / "config.toml"}):
        with pytest.raises(Exception, match=r"resume.* continues a run as it was configured"):
            simulate(resume=directory, **extra)
    assert tree(directory) == before


def test_the_summary_is_plain_json(whole: Path) -> None:
    text = (whole / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
