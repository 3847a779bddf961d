"""A model that was written and read again is the mounted one: of every family, cut evenly or not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine.artifact import FILE, WEIGHTS, load_model, save_adapter, save_model
from fedspine.errors import ModelError
from fedspine.lora.adapters import narrow
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.families import FAMILIES, decoders
from fedspine.structure import ModelShape, Structure
from fedspine.workbench import configure_threads
from tests.small_run import write_model
from tests.tiny import (
    TARGETS,
    even_structure,
    random_arrays,
    tiny_config,
    tiny_language_model,
    tiny_model,
    tokens,
    uneven_structure,
)

ROOT = Path(__file__).resolve().parents[1]
SAYS_IT_ALL = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3")
"""Families whose configuration can say that fewer heads of the same size are left."""
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Of tiny products, more threads only wait for one another."""
    configure_threads(1)


def all_heads(shape: ModelShape) -> Structure:
    return even_structure(shape, heads=4)


def write(
    folder: Path,
    family: str,
    cut: Callable[[ModelShape], Structure],
    merge: bool = True,
    language: bool = False,
    **settings: object,
) -> tuple[ResidentModel, bool]:
    """A random model, cut and saved: the mounted resident, and whether transformers can read the folder by itself."""
    model = (tiny_language_model if language else tiny_model)(family, **settings)  # type: ignore[arg-type]
    resident = ResidentModel(model, family, TARGETS, 6, 2.0)
    structure = cut(resident.shape)
    arrays = narrow(random_arrays(resident), structure, 6, resident.shape)
    resident.mount(structure, arrays, merge=merge)
    weights, task = resident.weights(), "causal-lm" if language else "classification"
    stock = save_model(folder, weights, tiny_config(family, **settings), task, structure.counts(), "base")
    if not merge:
        save_adapter(folder / "adapter", arrays, weights, resident.shape, resident.scale, task)
        resident.mount(structure, arrays, merge=True)
    return resident, stock


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(**tokens()).logits
    return found


@pytest.mark.parametrize("cut", [uneven_structure, even_structure, all_heads])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_was_mounted(tmp_path: Path, family: str, cut: Callable[[ModelShape], Structure]) -> None:
    resident, stock = write(tmp_path, family, cut)
    assert stock == (cut is all_heads or (cut is even_structure and family in SAYS_IT_ALL))
    assert stock != (tmp_path / FILE).exists()
    model = load_model(tmp_path)
    assert not model.training
    torch.testing.assert_close(logits(model), logits(resident.model), **CLOSE)
    expected = tiny_model(family).state_dict().keys()
    assert load_file(tmp_path / WEIGHTS).keys() == expected == model.state_dict().keys()
    if stock:
        alone = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(alone), logits(resident.model), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_is_one_of_peft(tmp_path: Path, family: str) -> None:
    resident, _ = write(tmp_path, family, uneven_structure, merge=False)
    base = load_model(tmp_path)
    apart = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(model), logits(resident.model), **CLOSE)
    assert (apart - logits(model)).abs().max() > 1e-3
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (6, 12, "SEQ_CLS")
    assert settings["base_model_name_or_path"] is None
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(resident.model), **CLOSE)


@pytest.mark.parametrize("cut", [uneven_structure, even_structure])
@pytest.mark.parametrize("family", decoders())
def test_a_language_model_writes_the_same_text(
    tmp_path: Path, family: str, cut: Callable[[ModelShape], Structure]
) -> None:
    """Greedily and with a cache of keys and values, token by token."""
    resident, stock = write(tmp_path, family, cut, language=True)
    kinds: list[Callable[..., Any]] = [load_model]
    if stock:
        kinds.append(AutoModelForCausalLM.from_pretrained)
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 1}
    prompt = tokens()["input_ids"][1:, :5]
    mask = torch.ones_like(prompt)
    model: Any = resident.model
    expected = model.generate(prompt, attention_mask=mask, **settings)
    assert expected.shape == (2, 17)
    for kind in kinds:
        again = kind(tmp_path)
        torch.testing.assert_close(logits(again), logits(resident.model), **CLOSE)
        assert torch.equal(again.generate(prompt, attention_mask=mask, **settings), expected)
    tied = tiny_config(family).tie_word_embeddings
    heads = {"lm_head.weight", "embed_out.weight"} & load_file(tmp_path / WEIGHTS).keys()
    assert len(heads) == (0 if tied else 1)
    assert (tmp_path / "generation_config.json").exists()


def test_the_adapter_of_a_language_model(tmp_path: Path) -> None:
    resident, _ = write(tmp_path, "llama", uneven_structure, merge=False, language=True)
    model = PeftModel.from_pretrained(load_model(tmp_path), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(model), logits(resident.model), **CLOSE)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["task_type"], settings["modules_to_save"]) == ("CAUSAL_LM", None)


def test_a_fresh_process_reads_it_too(tmp_path: Path) -> None:
    wanted = {}
    for number, family in enumerate(FAMILIES):
        resident, _ = write(tmp_path / family, family, (uneven_structure, even_structure)[number % 2])
        wanted[family] = logits(resident.model)
    code = (
        "import sys, torch, fedspine\n"
        "from safetensors.torch import load_file, save_file\n"
        "batch = load_file('batch.safetensors')\n"
        "save_file({name: fedspine.load_model(name)(**batch).logits.detach() for name in sys.argv[1:]}, 'out')\n"
    )
    save_file(tokens(), tmp_path / "batch.safetensors")
    subprocess.run(
        [sys.executable, "-c", code, *wanted],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=120,
    )
    for family, found in load_file(tmp_path / "out").items():
        torch.testing.assert_close(found, wanted[family], **CLOSE)


def test_a_head_count_that_does_not_divide_the_hidden_size(tmp_path: Path) -> None:
    """Llama's configuration refuses it, although its code could do it."""
    resident, stock = write(tmp_path, "llama", lambda shape: even_structure(shape, heads=3), hidden_size=32)
    assert not stock
    torch.testing.assert_close(logits(load_model(tmp_path)), logits(resident.model), **CLOSE)


def test_other_folders_load_as_they_are(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    expected = AutoModelForSequenceClassification.from_pretrained(folder)
    model = load_model(folder)
    assert type(model) is type(expected)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    write(folder, "llama", uneven_structure)
    return folder


def rewrite(folder: Path, file: str, **changes: Any) -> None:
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(values | changes), encoding="utf-8")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def reweigh(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(name, None)
    save_file(weights | ({} if tensor is None else {name: tensor}), folder / WEIGHTS)


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: truncate(f / FILE), r"fedspine\.json cannot be read: .*export the run again"),
        (lambda f: (f / FILE).write_text("[]"), "is of format None; this version of FedSpine reads"),
        (lambda f: rewrite(f, FILE, format="fedspine-model-9"), "is of format 'fedspine-model-9'"),
        (lambda f: rewrite(f, FILE, layers=[[1, "x"], [2, 3]]), r"fedspine\.json is incomplete: ValueError"),
        (lambda f: rewrite(f, FILE, layers=[[1, 16]]), "has 1 layers, the model 2"),
        (lambda f: rewrite(f, FILE, layers=[[1, 16], [5, 13]]), "layer 1 keeps 5 heads of 4"),
        (lambda f: rewrite(f, FILE, layers=[[1, 16], [2, 0]]), "layer 1 keeps 0 channels of 32"),
        (lambda f: rewrite(f, FILE, layers=[[1, 16], [2, 12]]), r"layer 1: .* is \[.*13.*\] in the weights and .*12"),
        (lambda f: rewrite(f, FILE, task="sorting"), "task 'sorting' must be one of classification, causal-lm"),
        (lambda f: rewrite(f, FILE, family="qwen2"), r"is of family 'qwen2', and config\.json beside it of 'llama'"),
        (lambda f: truncate(f / WEIGHTS), r"model\.safetensors cannot be read"),
        (lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors cannot be read"),
        (lambda f: reweigh(f, GATE, None), f"the weights hold no '{GATE}', which LlamaForSequenceClassification needs"),
        (lambda f: reweigh(f, GATE, torch.zeros(9, 24)), r"layer 1: .*gate_proj.weight' is \[9, 24\] in the weights"),
        (lambda f: reweigh(f, "model.extra", torch.zeros(2)), "have 'model.extra', which .* has no place for"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded: .*Give a folder that"),
        (lambda f: rewrite(f, "config.json", model_type="camel"), "cannot be loaded: .*camel"),
        (lambda f: (f / FILE).unlink(), "cannot be loaded: "),
    ],
)
def test_what_does_not_fit_together_is_one_message(
    saved: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    rewrite(folder, "config.json", architectures=["CamelForWater"])
    with pytest.raises(
        ModelError, match=r"names the architecture 'CamelForWater', which transformers .* does not have"
    ):
        load_model(folder)
    rewrite(folder, "config.json", architectures=["BertForMaskedLM"])
    with pytest.raises(ModelError, match=r"its weights hold no 'cls\..*', which BertForMaskedLM needs"):
        load_model(folder)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path / "nothing")
