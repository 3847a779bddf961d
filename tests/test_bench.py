"""`fedspine bench`: which figures there are and how they hang together; how long anything takes is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import fedspine
from fedspine import bench_memory, benchmark
from fedspine.artifact import save_model
from fedspine.bench_memory import Footprint, footprint
from fedspine.bench_subject import base_of, find, load, random_tokens
from fedspine.benchmark import BenchResult, alternate
from fedspine.cli import main
from fedspine.errors import ConfigError, ModelError
from fedspine.lora.adapters import narrow
from fedspine.report.bench_table import BenchConsole, in_words
from tests.tiny import random_arrays, tiny_config, tiny_resident, uneven_structure

SMALL = {"batch": (1, 3), "length": 7, "repeats": 3, "new_tokens": 4}
OPTIONS = ["--batch", "1", "3", "--length", "7", "--repeats", "3", "--new-tokens", "4"]


def write(folder: Path, kind: Any = AutoModelForSequenceClassification, family: str = "bert", **sizes: object) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind.from_config(tiny_config(family, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    return {
        "encoder": write(base / "encoder"),
        "half": write(base / "half", intermediate_size=16),
        "bare": write(base / "bare", AutoModel),
        "decoder": write(base / "decoder", AutoModelForCausalLM, "llama"),
        "reader": write(base / "reader", family="llama"),
        "roberta": write(base / "roberta", family="roberta"),
    }


@pytest.fixture(scope="module")
def measured(models: dict[str, str]) -> BenchResult:
    return fedspine.bench(models["half"], models["encoder"], **SMALL)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as if it were measured: a process that imports torch takes seconds."""
    monkeypatch.setattr(benchmark, "footprint", lambda *_: Footprint(1000, 3000))


def parameters(folder: str) -> int:
    return sum(p.numel() for p in AutoModelForSequenceClassification.from_pretrained(folder).parameters())


def test_the_figures_of_two_encoders(models: dict[str, str], measured: BenchResult) -> None:
    assert measured.against is not None
    for figures, name in ((measured.model, "half"), (measured.against, "encoder")):
        assert figures.parameters == parameters(models[name])
        assert figures.weight_bytes == (Path(models[name]) / "model.safetensors").stat().st_size
        assert [row.batch for row in figures.latency] == [1, 3]
        assert all(0 < row.minimum <= row.p50 <= row.p95 for row in figures.latency)
        assert figures.generation == ()
        assert 0 <= figures.peak_memory_bytes < figures.process_peak_bytes
    ratios = measured.ratios()
    assert ratios["parameters"] == parameters(models["half"]) / parameters(models["encoder"]) < 1
    assert ratios["weight_bytes"] < 1
    assert ratios["tokens_per_second"] == []
    for row, ours, theirs in zip(ratios["latency"], measured.model.latency, measured.against.latency, strict=True):
        assert row == {
            "batch": ours.batch,
            "p50": ours.p50 / theirs.p50,
            "p95": ours.p95 / theirs.p95,
            "minimum": ours.minimum / theirs.minimum,
        }


@pytest.mark.usefixtures("no_process")
def test_a_decoder_generates_exactly_so_many_tokens(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(load(find(models["decoder"]), "cpu", "float32"))
    lengths, generate = [], kind.generate

    def recorded(*arguments: Any, **keys: Any) -> torch.Tensor:
        tokens: torch.Tensor = generate(*arguments, **keys)
        lengths.append(tuple(tokens.shape))
        return tokens

    monkeypatch.setattr(kind, "generate", recorded)
    figures = fedspine.bench(models["decoder"], **SMALL).model
    assert set(lengths) == {(1, 11), (3, 11)}
    assert [made.batch for made in figures.generation] == [1, 3]
    assert all(made.tokens_per_second > 0 for made in figures.generation)
    assert [row.batch for row in figures.latency] == [1, 3]


@pytest.mark.usefixtures("no_process")
def test_threads_stay_as_they_were(models: dict[str, str]) -> None:
    before = torch.get_num_threads()
    result = fedspine.bench(models["encoder"], **{**SMALL, "threads": before + 1})
    assert torch.get_num_threads() == before
    assert result.settings.threads == before + 1
    assert result.against is None
    assert result.ratios() == {}
    assert in_words(result) == ""


def test_calls_are_run_in_turn() -> None:
    order: list[str] = []
    steps: list[int] = []
    seconds = alternate([lambda: order.append("a"), lambda: order.append("b")], 4, steps.append, warm_up=2)
    assert order == ["a", "b"] * 6
    assert [len(row) for row in seconds] == [4, 4]
    assert steps[-1] == 4


def test_the_command_line_prints_a_table(
    models: dict[str, str], measured: BenchResult, capsys: pytest.CaptureFixture[str]
) -> None:
    console = BenchConsole()
    console.progress("latency, batch 1", 0, 3)
    console.finished(measured)
    out = capsys.readouterr().out
    for words in ("ratio", "latency, batch 3", "peak memory", "weights on disk", "times as fast as", "in alternation"):
        assert words in " ".join(out.split())


@pytest.mark.usefixtures("no_process")
def test_the_command_line_prints_json(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", models["bare"], "--against", models["half"], *OPTIONS, "--dtype", "bfloat16", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    figures = json.loads(out)
    assert set(figures) == {"ratios", "model", "against", "note", "settings", "machine"}
    assert figures["settings"]["dtype"] == "bfloat16"
    # A model without a head is measured under one like the other's.
    assert figures["model"]["parameters"] == parameters(models["encoder"])
    assert figures["ratios"]["parameters"] > 1


@pytest.mark.usefixtures("no_process")
def test_an_export_is_compared_with_its_base(models: dict[str, str], tmp_path: Path) -> None:
    export = write(tmp_path / "export", intermediate_size=16)
    card = tmp_path / "export" / "README.md"
    card.write_text(f"---\nbase_model: {models['bare']}\ntags:\n- fedspine\n---\n", encoding="utf-8")
    result = fedspine.bench(export, **SMALL)
    assert result.against is not None
    assert (result.against.name, result.note) == (models["bare"], "")
    assert result.against.parameters == parameters(models["encoder"])
    card.write_text("---\nbase_model: ./gone\ntags: [fedspine]\n---\n", encoding="utf-8")
    alone = fedspine.bench(export, **SMALL)
    assert alone.against is None
    assert "./gone: there is no such folder" in alone.note
    card.write_text("---\ntags: [fedspine]\n---\n", encoding="utf-8")
    (tmp_path / "export" / "adapter").mkdir()
    alone = fedspine.bench(export, **SMALL)
    assert alone.against is None
    assert "its card does not name the folder that it was cut from; name it with against" in alone.note
    assert "adapter are left out, as if they were folded in" in alone.note
    for foreign in ("---\nbase_model: ./gone\n---\n", "---\n- tags\n---\n", "---\ntags: [fedspine\n---\n", "text"):
        card.write_text(foreign, encoding="utf-8")
        assert base_of(export) is None


@pytest.mark.usefixtures("no_process")
def test_a_model_whose_layers_differ(models: dict[str, str], tmp_path: Path) -> None:
    resident = tiny_resident()
    structure = uneven_structure(resident.shape)
    resident.mount(structure, narrow(random_arrays(resident), structure, 6, resident.shape), merge=True)
    folder = tmp_path / "cut"
    save_model(folder, resident.weights(), tiny_config("bert"), "classification", structure.counts(), "bert")
    result = fedspine.bench(folder, models["encoder"], **SMALL)
    assert result.against is not None
    cut = resident.shape.prunable_parameters - structure.kept_parameters(resident.shape)
    assert result.against.parameters - result.model.parameters == cut


@pytest.mark.usefixtures("no_process")
def test_a_decoder_that_classifies_takes_batches(models: dict[str, str]) -> None:
    figures = fedspine.bench(models["reader"], **SMALL).model
    assert figures.generation == ()
    assert len(figures.latency) == 2


def test_tokens_are_of_the_vocabulary_and_no_padding(models: dict[str, str]) -> None:
    subject = find(models["roberta"])
    tokens = random_tokens([subject], 40, 30, "cpu")["input_ids"]
    assert sorted(set(tokens.flatten().tolist())) == [0, *range(2, 60)]
    assert torch.equal(tokens, random_tokens([subject], 40, 30, "cpu")["input_ids"])


def without_weights(folder: Path) -> str:
    path = write(folder)
    (folder / "model.safetensors").unlink()
    return path


def torn(folder: Path) -> str:
    path = write(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return path


def of_a_run(folder: Path) -> str:
    folder.mkdir()
    (folder / "rounds.jsonl").touch()
    return str(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: f"{folder}/absent", "there is no such folder"),
        (lambda folder: str(folder.parent), "is no model: it has no config.json"),
        (of_a_run, "is the directory of a run; `fedspine export"),
        (without_weights, "cannot be loaded: "),
        (torn, "cannot be loaded: "),
    ],
    ids=["absent", "no model", "run", "no weights", "torn"],
)
@pytest.mark.usefixtures("no_process")
def test_what_is_no_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, words: str
) -> None:
    assert main(["bench", make(tmp_path / "model"), *OPTIONS]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedspine: error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "41"], "takes at most 40 tokens"),
        (["--length", "0"], "length = 0: must be at least 1"),
        (["--batch", "4", "0"], "batch = 0: must be at least 1"),
        (["--repeats", "0"], "repeats = 0: must be at least 1"),
        (["--threads", "-1"], "threads = -1: must be at least 1"),
        (["--new-tokens", "0"], "new_tokens = 0: must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line(
    models: dict[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["bench", models["encoder"], *OPTIONS, *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_bounds_of_length(models: dict[str, str]) -> None:
    assert find(models["roberta"]).longest == 38  # of 40 positions, two lie before the first token's
    with pytest.raises(ModelError, match=r"length = 37 and new_tokens = 4: .* takes at most 40 tokens"):
        fedspine.bench(models["decoder"], **{**SMALL, "length": 37})


def test_wrong_values_in_python(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"its head is for CausalLM, that of .* for SequenceClassification"):
        fedspine.bench(models["encoder"], models["decoder"], **SMALL)
    with pytest.raises(ConfigError, match="dtype = 'float16': must be one of float32, bfloat16"):
        fedspine.bench(models["encoder"], dtype="float16")
    with pytest.raises(ConfigError, match="batch = 0: must be at least 1"):
        fedspine.bench(models["encoder"], batch=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="torch finds no CUDA device here; use device = 'cpu'"):
        fedspine.bench(models["encoder"], device="cuda")


def test_what_the_process_of_a_model_prints(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors cross from the process to the person; here both are one process."""

    def here(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["bench_memory", command[-1]])
        bench_memory._main()
        return subprocess.CompletedProcess(command, 0, *capsys.readouterr())

    monkeypatch.setattr(subprocess, "run", here)
    threads = torch.get_num_threads()
    found = footprint(find(models["encoder"]), 2, 8, threads, "cpu", "float32")
    assert 0 <= found.model < found.process
    with pytest.raises(ModelError, match="cannot be loaded: "):
        footprint(find(torn(tmp_path / "torn")), 2, 8, threads, "cpu", "float32")


def test_a_killed_process_is_told(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(ModelError, match=r"was killed \(SIGKILL\), as happens when memory runs out"):
        footprint(find(models["encoder"]), 1, 8, 1, "cpu", "float32")
