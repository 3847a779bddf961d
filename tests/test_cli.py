"""The command line: what it prints, and that a mistake is one line, exit code 2, and nothing written."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AlbertConfig, GPT2Config

from fedspine.cli import main
from fedspine.config import METHODS, RunConfig
from tests.small_run import KEYS, options, write_data, write_model

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "flwr", "transformers", "ray", "pandas", "numpy")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("material")
    write_model(base / "model")
    write_data(base / "data")
    return base


@pytest.fixture
def here(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `model` and `data` to spoil."""
    folder = tmp_path / "here"
    shutil.copytree(material, folder)
    monkeypatch.chdir(folder)
    return folder


def keys(here: Path, **changes: Any) -> list[str]:
    """A small run's keys as options, with changes."""
    return options({**KEYS, "model": str(here / "model"), "data": str(here / "data"), **changes})


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    before = tree(here)
    capsys.readouterr()
    assert main(["simulate", "--engine", "inline", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedspine: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert tree(here) == before


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"roundz": 3}, "unknown key 'roundz': did you mean 'rounds'?"),
    ({"target_sparsity": 1.5}, "target_sparsity = 1.5: must be at most 0.95"),
    ({"seed": -1}, "seed = -1: must be at least 0"),
    ({"rounds": "many"}, "rounds = 'many': must be a whole number"),
    ({"rounds": 2.5}, "rounds = 2.5: must be a whole number"),
    ({"policy": 1}, "policy = 1: must be a text"),
    ({"policy": "fedspin"}, "(did you mean 'fedspine'?)"),
    ({"method": "fedproxy"}, "method = 'fedproxy': must be one of fedspine, fedspine-paper, fedavg"),
    ({"lora_targets": ["q", "x"]}, "'x' must be one of q, k, v, o, gate, up, down"),
    ({"lora_targets": ["gate"]}, "lora_targets has 'gate', which family 'bert' does not have"),
    ({"sampled": 9}, "sampled = 9: more than devices = 8"),
    ({"devices": 121}, "devices = 121: "),
    ({"fixed_rank": 2}, "fixed_rank = 2: must lie between min_rank = 4 and max_rank = 16"),
    ({"warmup_ratio": 0.7}, "warmup_ratio = 0.7: must be below ramp_ratio = 0.6"),
    ({"target_sparsity": 0.95}, "target_sparsity = 0.95: this model can be cut to at most 0.8"),
    ({"max_length": 64}, "max_length = 64: "),
    ({"text_column": "body"}, "no column 'body'; it has text, label, writer. Name it with text_column"),
    ({"label_column": "mood"}, "no column 'mood'; it has text, label, writer. Name it with label_column"),
    ({"partition": "column:owner"}, "partition = 'column:owner': no such column in the data"),
    ({"partition": "column:writer", "devices": 20}, "12 values for devices = 20; use at most 12 devices"),
    (
        {"partition": "alphabetical"},
        "partition = 'alphabetical': must be auto, iid, dirichlet, shards, all or column:NAME",
    ),
    ({"partition": "shards"}, "min_classes = 2; use fewer devices, a larger dirichlet_alpha or another partition"),
    ({"partition": "shards", "devices": 100, "min_classes": 1}, "has no rows; use fewer devices"),
    ({"population": "jetson-8"}, "population = 'jetson-8': neither a file nor one of the built-in catalogues"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    refused(here, capsys, [*keys(here, **changes), "--out", "new"], words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rounds", "-s 'rounds': write it as key=value"),
        ("=3", "-s '=3': write it as key=value"),
        ("learning_rate=nan", "learning_rate = nan: must be at least"),
        ("rounds=[1", "rounds = '[1': must be a whole number"),
        ("text_column=", "no column named"),
    ],
)
def test_a_wrong_override_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    if override == "text_column=":
        data = here / "data" / "train.tsv"
        data.write_text(data.read_text(encoding="utf-8").replace("text\t", "body\t", 1), encoding="utf-8")
    refused(here, capsys, [*keys(here), "-s", override], words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rounds = ", "configuration file run.toml is not valid TOML: "),
        ("rounds = 3\nrounds = 4\n", "configuration file run.toml is not valid TOML: "),
        ("round = 3\n", "unknown key 'round': did you mean 'rounds'?"),
        ("[federation]\nrounds = 3\n", "unknown key 'federation'"),
        (b"\xff\xfe\x00", "configuration file run.toml cannot be read: "),
        (None, "configuration file run.toml does not exist"),
        ("a folder", "configuration file run.toml cannot be read: "),
    ],
    ids=["broken", "twice", "unknown key", "table", "binary", "absent", "folder"],
)
def test_a_wrong_configuration_file_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], content: str | bytes | None, words: str
) -> None:
    path = here / "run.toml"
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(here, capsys, ["run.toml", "--out", "new"], words)


def without_data(here: Path) -> None:
    shutil.rmtree(here / "data")


def without_evaluation(here: Path) -> None:
    (here / "data" / "dev.tsv").unlink()


def empty_data(here: Path) -> None:
    (here / "data" / "train.tsv").write_text("", encoding="utf-8")


def foreign_label(here: Path) -> None:
    with open(here / "data" / "dev.tsv", "a", encoding="utf-8") as file:
        file.write("the film was odd\tugly\tw0\n")


def one_class(here: Path) -> None:
    path = here / "data" / "train.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("\tbad\t", "\tgood\t"), encoding="utf-8")


def without_text(here: Path) -> None:
    path = here / "data" / "train.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3] = "\tgood\tw1"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def without_model(here: Path) -> None:
    shutil.rmtree(here / "model")


def without_weights(here: Path) -> None:
    (here / "model" / "model.safetensors").unlink()


def without_model_config(here: Path) -> None:
    (here / "model" / "config.json").unlink()


def broken_model_config(here: Path) -> None:
    (here / "model" / "config.json").write_text("{", encoding="utf-8")


def torn_weights(here: Path) -> None:
    path = here / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def misfitting_weights(here: Path) -> None:
    path = here / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    save_file({**tensors, name: np.zeros((6, 6), np.float32)}, path, {"format": "pt"})


def without_tokenizer(here: Path) -> None:
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (here / "model" / name).unlink()


def broken_tokenizer(here: Path) -> None:
    (here / "model" / "tokenizer.json").write_text("{}", encoding="utf-8")


def albert(here: Path) -> None:
    AlbertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4).save_pretrained(here / "model")


def gpt2(here: Path) -> None:
    GPT2Config(n_embd=24, n_layer=2, n_head=4).save_pretrained(here / "model")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_data, "data': there is no such file or folder"),
        (without_evaluation, "no evaluation file; expected one of dev, "),
        (empty_data, "train.tsv"),
        (foreign_label, "the evaluation rows have the label 'ugly', which the training rows do not"),
        (one_class, "column 'label' has only one class, 'good'; two or more are needed"),
        (without_text, "row 3 of the train rows has an empty 'text'"),
        (without_model, "model' cannot be loaded: "),
        (without_weights, "model' cannot be loaded: "),
        (without_model_config, "model' cannot be loaded: "),
        (broken_model_config, "model' cannot be loaded: "),
        (torn_weights, "model' cannot be loaded: "),
        (misfitting_weights, "model' cannot be loaded: "),
        (without_tokenizer, "model' cannot be loaded: "),
        (broken_tokenizer, "model' cannot be loaded: "),
        (albert, "model family 'albert' is not supported; supported: bert, roberta"),
        (gpt2, "model family 'gpt2' is not supported; supported: bert, roberta"),
    ],
    ids=lambda value: getattr(value, "__name__", "message"),
)
def test_wrong_data_or_model_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], words: str
) -> None:
    spoil(here)
    refused(here, capsys, [*keys(here), "--out", "new"], words)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("data", "--out data: already in use; choose another directory, or --resume data to continue it"),
        ("data/train.tsv", "--out data/train.tsv: already in use"),
        ("data/train.tsv/run", "--out data/train.tsv/run: "),
    ],
)
def test_an_output_directory_in_use_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], out: str, words: str
) -> None:
    refused(here, capsys, [*keys(here), "--out", out], words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "nowhere"], "--resume nowhere: there is no such directory"),
        (["--resume", "data"], "--resume data: it holds no config.toml, so it is no run directory"),
        (["--resume", "data/train.tsv"], "--resume data/train.tsv: "),
        (["--resume", "data", "-s", "rounds=3"], "--resume continues a run as it was configured"),
        (["--resume", "data", "--out", "new"], "leave out CONFIG.toml, -s and --out"),
        (["run.toml", "--resume", "data"], "--resume continues a run as it was configured"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--workers", "-2"], "--workers -2: must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "message",
)
def test_wrong_options_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    refused(here, capsys, arguments, words)


def test_json_prints_only_the_summary(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *keys(here, rounds=2), "--engine", "inline", "--out", "run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((here / "run" / "summary.json").read_text(encoding="utf-8"))
    assert err == ""


def test_a_person_reads_plan_and_result_on_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """File names may hold what the console's library takes for markup."""
    (here / "data").rename(here / "[bold]data")
    arguments = keys(here, rounds=2, data="[bold]data", target_accuracy=0.1)
    assert main(["simulate", *arguments, "--engine", "inline", "--out", "[draft]/run"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("[bold]data,", "[draft]/run", "accuracy", "prunable", "round 2/2", "tensorboard --logdir"):
        assert words in err
    assert "Traceback" not in err


def test_file_and_overrides_make_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**KEYS, "model": str(here / "model"), "data": str(here / "data"), "rounds": 9, "seed": 5}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (here / "run.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["simulate", "run.toml", "-s", "rounds=1", "--engine", "inline", "--json"]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rounds"], summary["seed"]) == (1, 5)
    (run,) = (here / "runs").iterdir()
    assert run.name.startswith("fedspine-")


def quick(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process, which prints the heavy modules that it imported as its last line."""
    code = (
        "import sys\nfrom fedspine.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as leave:\n    code = leave.code\n"
        f"print(sorted(sys.modules.keys() & set({HEAVY!r})))\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"], ["--version"], ["keys"]], ids=" ".join)
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    result = quick(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "[]"
    if "--help" in arguments:
        assert "fedspine simulate --resume" in result.stdout


def test_a_wrong_key_needs_nothing_heavy() -> None:
    result = quick("simulate", "-s", "roundz=3")
    assert result.returncode == 2
    assert result.stderr.startswith("fedspine: error: unknown key 'roundz'")
    assert result.stdout == "[]\n"


def test_keys_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(" = ", 1) for line in lines if not line.startswith(" "))
    assert list(listed) == [field.name for field in dataclasses.fields(RunConfig)]
    assert listed["rounds"] == str(RunConfig().rounds)
    assert all(line.strip() for line in lines)
    assert any(all(method in line for method in METHODS) for line in lines)


def test_module_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fedspine", "simulate", "--workers", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fedspine: error: --workers 0: must be at least 1\n"
