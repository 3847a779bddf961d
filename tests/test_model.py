"""Loading a model of every family: no dropout, no cache, and a padding token that its head agrees on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast

from fedspine.config import RunConfig
from fedspine.errors import ModelError
from fedspine.model import load_base, load_tokenizer
from fedspine.pruning.families import FAMILIES
from tests.small_run import write_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_its_texts_one_by_one(tmp_path: Path, family: str) -> None:
    config = RunConfig(model=str(write_model(tmp_path / "model", family=family)), max_length=12)
    tokenizer = load_tokenizer(config)
    model, found = load_base(config, 2, tokenizer.pad_token_id)
    assert found == family
    assert not model.training
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert not any(value for name, value in model.config.to_dict().items() if "drop" in name and name != "qa_dropout")
    texts = ["the film was good", "bad", "a very dull book and so cold"]
    split = BertTokenizerFast.from_pretrained(config.model)  # for some families transformers insists on their own
    with torch.no_grad():
        together = model(**split(texts, padding=True, return_tensors="pt")).logits
        alone = [model(**split(text, return_tensors="pt")).logits[0] for text in texts]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_without_a_padding_token_the_end_of_text_pads(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", family="llama")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), pad_token=None, eos_token="so").save_pretrained(folder)
    config = RunConfig(model=str(folder), max_length=12)
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token == "so"
    model, _ = load_base(config, 2, tokenizer.pad_token_id)
    assert model.config.pad_token_id == tokenizer.convert_tokens_to_ids("so")


def test_a_padding_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    config = RunConfig(model=str(write_model(tmp_path / "model", family="llama")), max_length=12)
    with pytest.raises(ModelError, match="has 27 tokens, and its tokenizer pads with 27"):
        load_base(config, 2, 27)
