"""Tensors that are read again from the files of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fedspine.errors import ModelError
from fedspine.model import EMBEDDED
from fedspine.pruning.families import projections
from fedspine.published import reader_of, weight_files
from tests.tiny import TINY, tiny_model


@pytest.mark.parametrize("family", list(TINY))
@pytest.mark.parametrize("form", ["whole", "without head", "shards"])
def test_every_projection_is_read_as_transformers_loads_it(family: str, form: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    prefix = model.base_model_prefix
    saved = getattr(model, prefix) if form == "without head" else model
    saved.save_pretrained(tmp_path, max_shard_size=10_000 if form == "shards" else "1GB")
    assert (len(weight_files(str(tmp_path))) > 1) == (form == "shards")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    names = [f"{module.name}.weight" for module in projections(model, family)]
    read = reader_of(str(tmp_path), prefix, names)
    assert read
    for name in names:
        tensor = read(name)
        assert torch.equal(tensor, loaded.get_parameter(name))
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_the_embedded_model_can_be_read_again() -> None:
    read = reader_of(EMBEDDED, "bert", ["bert.encoder.layer.0.output.dense.weight"])
    assert read
    assert read("bert.encoder.layer.0.output.dense.weight").shape == (384, 1536)


def test_a_model_whose_files_are_absent_or_call_it_otherwise_has_no_reader(tmp_path: Path) -> None:
    model = tiny_model()
    assert reader_of(str(tmp_path), "bert", ["bert.encoder.layer.0.output.dense.weight"]) is None
    assert reader_of("nobody/no-such-model", "bert", ["bert.encoder.layer.0.output.dense.weight"]) is None
    model.save_pretrained(tmp_path)
    assert reader_of(str(tmp_path), "bert", ["bert.encoder.layer.0.output.dense.weight"])
    assert reader_of(str(tmp_path), "bert", ["bert.encoder.layer.0.output.other.weight"]) is None


def test_a_whole_file_goes_before_shards(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path, max_shard_size=10_000)
    shards = {file.name: file.read_bytes() for file in tmp_path.glob("model*")}
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    name = "bert.encoder.layer.0.output.dense.weight"
    read = reader_of(str(tmp_path), "bert", [name])
    assert read
    assert torch.equal(read(name), model.get_parameter(name))
    assert torch.equal(read(name), AutoModelForSequenceClassification.from_pretrained(tmp_path).get_parameter(name))


def test_files_that_changed_or_went_are_told(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight"
    read = reader_of(str(tmp_path), "bert", [name])
    assert read
    tiny_model(seed=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is another file than when this process loaded it"):
        read(name)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="its weights cannot be read again"):
        read(name)
