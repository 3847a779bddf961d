"""`fedspine export`: a finished run becomes a folder that stands alone, or one line says why not."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedspine
from fedspine.checkpoint import load_state, save_state
from fedspine.cli import main
from fedspine.config import load_config
from fedspine.data.encode import evaluation_batches
from fedspine.lora.adapters import narrow
from fedspine.report.card import command
from fedspine.structure import Structure
from fedspine.training import evaluate
from fedspine.workbench import Workbench, workbench
from tests.small_run import KEYS, WORDS, write_data, write_model
from tests.test_language_model import RUN, write_instructions
from tests.tiny import uneven_structure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; the last device's structure is uneven."""
    base = tmp_path_factory.mktemp("base")
    write_model(base / "model")
    write_data(base / "data")
    paths = {"model": str(base / "model"), "data": str(base / "data")}
    directory = fedspine.simulate(**{**KEYS, **paths, "rounds": 3}, out=base / "run").directory
    config = load_config(directory / "config.toml", {})
    shape = workbench(config.to_json()).shape
    state = load_state(directory, config, shape)
    save_state(directory, config, replace(state, structures={**state.structures, 7: uneven_structure(shape)}))
    return directory


def mounted(run: Path, device: int | None) -> tuple[Workbench, Structure]:
    """The workbench of a run, with the merged model of a device mounted."""
    config = load_config(run / "config.toml", {})
    bench = workbench(config.to_json())
    state = load_state(run, config, bench.shape)
    structure = state.consensus if device is None else state.structures[device]
    bench.resident.mount(structure, narrow(state.averaged, structure, config.max_rank, bench.shape), merge=True)
    return bench, structure


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("device", [None, 7])
def test_an_export_is_the_model_of_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], device: int | None, merge: bool
) -> None:
    out = tmp_path / "new" / "model"
    chosen = ["--consensus"] if device is None else ["--device", str(device)]
    capsys.readouterr()
    assert main(["export", str(run), *chosen, *(["--merge"] if merge else []), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"{out}: ")
    assert told.err.count("\n") == 1
    assert list(out.parent.iterdir()) == [out]
    files = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "fedspine.json", "tokenizer.json", "README.md"} <= files
    assert ("adapter" in files) != merge
    for path in out.rglob("*"):
        assert not path.is_file() or str(run.parent).encode() not in path.read_bytes()

    bench, structure = mounted(run, device)
    model: Any = fedspine.load_model(out)
    assert json.loads((out / "fedspine.json").read_text())["layers"] == [list(pair) for pair in structure.counts()]
    assert model.config.id2label == {0: "bad", 1: "good"}
    if not merge:
        assert (out / "adapter/adapter_model.safetensors").exists()
        model = PeftModel.from_pretrained(model, out / "adapter").eval()
    batch = AutoTokenizer.from_pretrained(out)(["the film was good", "bad"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, bench.resident.model(**batch).logits, rtol=1e-5, atol=1e-5)
    accuracy, loss, _ = evaluate(bench.resident, evaluation_batches(bench.test, 64, bench.pad_id))
    text = (out / "README.md").read_text(encoding="utf-8")
    assert f"| {accuracy:.4f}, loss {loss:.4f} |" in text
    assert f"{structure.sparsity(bench.shape):.1%} of the prunable parameters" in text


def test_the_card_tells_what_a_reader_needs(run: Path, tmp_path: Path) -> None:
    done = fedspine.export(run, out=tmp_path / "model", merge=True)
    text = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "base_model" not in head  # a folder here, which nobody else could follow
    assert "pipeline_tag: text-classification" in head
    for part in ("## How to load", 'fedspine.load_model("model")', "`bad`, `good`", "40 evaluation rows", "Seed 0"):
        assert part in body
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert f"{summary['device_accuracy_mean']:.4f} ({summary['device_accuracy_sd']:.4f})" in body
    assert f"{done.measured.parameters:,}" in body
    weights = load_file(tmp_path / "model/model.safetensors")
    assert done.measured.parameters == sum(tensor.numel() for tensor in weights.values())
    assert done.measured.parameters < done.measured.base_parameters
    assert done.measured.file_bytes == (tmp_path / "model/model.safetensors").stat().st_size
    assert command(load_config(run / "config.toml", {})).startswith("fedspine simulate \\\n  -s model=model")


def test_transformers_reads_a_run_without_pruning(run: Path, tmp_path: Path) -> None:
    """A run that is still going on: no summary, and every device uncut."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    config = load_config(copy / "config.toml", {})
    shape = workbench(config.to_json()).shape
    state = load_state(copy, config, shape)
    save_state(copy, config, replace(state, round=1, structures={}, consensus=Structure.full(shape)))
    (tmp_path / "model").mkdir()
    done = fedspine.export(copy, out=tmp_path / "model", device=2, merge=True)
    assert done.stock
    assert done.sparsity == 0
    assert not (tmp_path / "model/fedspine.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    again = fedspine.load_model(tmp_path / "model")
    for found, wanted in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(found, wanted)
    text = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert 'AutoModelForSequenceClassification.from_pretrained("model")' in text
    assert "had not finished at the export: 1 of 3 rounds" in text


def test_a_language_model_answers_after_its_export(tmp_path: Path) -> None:
    """One that transformers reads by itself: as many heads and channels in every layer of a Llama."""
    paths = {
        "model": str(write_model(tmp_path / "base", family="llama", language=True)),
        "data": str(write_instructions(tmp_path / "rows.jsonl")),
    }
    run = fedspine.simulate(**{**RUN, **paths}, out=tmp_path / "run").directory
    done = fedspine.export(run, out=tmp_path / "model", merge=True)
    assert done.stock
    bench, _ = mounted(run, None)
    _, loss, _ = evaluate(bench.resident, bench.evaluation_batches(bench.test))
    assert done.measured.loss == pytest.approx(loss, abs=1e-5)
    text = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0].replace('"model"', repr(str(tmp_path / "model")))
    told: list[str] = []
    exec(code, {"print": told.append})  # what the card tells a reader to write
    assert set(told[0].split()) <= set(WORDS)  # the words of the prompt are unknown, and left out
    assert f"perplexity {math.exp(loss):.2f}" in text


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda run: (run / "checkpoint/state.safetensors").unlink(), [], "has no checkpoint"),
        (lambda run: (run / "config.toml").unlink(), [], "is no run directory: it holds no config.toml"),
        (lambda run: shutil.rmtree(run), [], "is no run directory: there is no such directory"),
        (lambda run: None, ["--device", "8"], "device = 8: the run has devices 0 to 7"),
        (lambda run: None, ["--device", "-1"], "device = -1: the run has devices 0 to 7"),
        (lambda run: (run / "summary.json").write_text("{"), [], "summary.json cannot be read"),
        (lambda run: (run / "checkpoint/state.safetensors").write_bytes(b"x" * 9), [], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    options: list[str],
    message: str,
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    spoil(copy)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["export", str(copy), *options, "--out", str(tmp_path / "model")]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("fedspine: error: ")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_use_is_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", str(run), "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: already in use; choose another directory" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_base_without_a_tokenizer(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    model = tmp_path / "base"
    shutil.copytree(run.parent / "model", model)
    for name in ("tokenizer.json", "vocab.txt"):
        (model / name).unlink(missing_ok=True)
    text = (copy / "config.toml").read_text(encoding="utf-8")
    (copy / "config.toml").write_text(text.replace(str(run.parent / "model"), str(model)), encoding="utf-8")
    assert main(["export", str(copy), "--out", str(tmp_path / "model")]) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_nothing_is_left_of_an_export_that_failed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedspine.exporting.card", fail)
    assert main(["export", str(run), "--out", str(tmp_path / "model")]) == 130
    assert os.listdir(tmp_path) == []


def test_onnx_without_its_libraries(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(run), "--onnx", "--out", str(tmp_path / "model")]) == 2
    assert "onnxruntime; install with `pip install 'fedspine[onnx]'`" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_onnx_gives_the_same_logits(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed: pip install 'fedspine[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    fedspine.export(run, out=tmp_path / "model", device=7, onnx=True)
    bench, _ = mounted(run, 7)
    session = runtime.InferenceSession(tmp_path / "model/model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for texts in (["the film was good", "bad"], ["so cold"] * 5):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})
        with torch.inference_mode():
            wanted = bench.resident.model(**batch).logits
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
    assert "ONNX Runtime" in (tmp_path / "model/README.md").read_text(encoding="utf-8")
