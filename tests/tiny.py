"""Tiny random models and arrays that many tests share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from fedspine.lora.resident import ResidentModel
from fedspine.structure import ModelShape, Structure
from fedspine.types import Array, Scores

TARGETS = ("q", "v", "o", "up", "down")

_SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
_GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

TINY: dict[str, dict[str, object]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "xlm-roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"hidden_dim": 32},
    "llama": {**_GROUPED, "head_dim": 4, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**_GROUPED, "head_dim": 4},
    "qwen3": {**_GROUPED, "head_dim": 6, "attention_bias": True},
    "mistral": {**_GROUPED, "head_dim": 4, "sliding_window": 4},
    "gemma": {**_GROUPED, "head_dim": 4, "tie_word_embeddings": True},
    "gemma2": {**_GROUPED, **_SLIDING, "head_dim": 6, "query_pre_attn_scalar": 6},
    "gemma3_text": {**_GROUPED, **_SLIDING, "head_dim": 4, "query_pre_attn_scalar": 4},
    "phi3": {
        **_GROUPED,
        "head_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "eos_token_id": 2,
    },
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.7}},
}
"""What a family's tiny model has besides `_SIZES`: 4 heads (KV groups) and 32 channels a layer in all of them."""
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")


def tiny_config(family: str, **settings: object) -> PretrainedConfig:
    """`settings` go before those of the table."""
    return AutoConfig.for_model(family, **{**_SIZES, **TINY[family], **settings})


def tiny_model(family: str = "bert", seed: int = 0, **settings: object) -> nn.Module:
    """Two layers with random weights."""
    config = tiny_config(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        for parameter in model.parameters():  # biases start at zero, which would hide errors in cutting them
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tiny_language_model(family: str = "llama", seed: int = 0, **settings: object) -> nn.Module:
    """The same as a causal language model, of a decoder's family."""
    config = tiny_config(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]


def tiny_resident(
    family: str = "bert", targets: tuple[str, ...] = TARGETS, rank: int = 6, **settings: object
) -> ResidentModel:
    return ResidentModel(tiny_model(family, **settings), family, targets, rank, 2.0)  # type: ignore[arg-type]


def random_arrays(resident: ResidentModel, rank: int = 6, seed: int = 0) -> dict[str, Array]:
    """Adapters in full coordinates with non-zero B, and the model's head."""
    rng = np.random.default_rng(seed)
    arrays = dict(resident.head_arrays())
    for module in resident.shape.modules:
        arrays[f"{module.name}.A"] = rng.normal(0, 0.2, (rank, module.d_in)).astype(np.float32)
        arrays[f"{module.name}.B"] = rng.normal(0, 0.2, (module.d_out, rank)).astype(np.float32)
    return arrays


def random_scores(shape: ModelShape, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return tuple(
        (rng.random(shape.heads, dtype=np.float32) + 0.01, rng.random(shape.channels, dtype=np.float32) + 0.01)
        for _ in range(shape.layers)
    )


def uneven_structure(shape: ModelShape, seed: int = 0) -> Structure:
    """Another number of heads and channels in every layer."""
    rng = np.random.default_rng(seed)
    masks = []
    for layer in range(shape.layers):
        heads, channels = np.zeros(shape.heads, bool), np.zeros(shape.channels, bool)
        heads[rng.choice(shape.heads, 1 + layer % shape.heads, replace=False)] = True
        channels[rng.choice(shape.channels, shape.channels // 2 - 3 * layer, replace=False)] = True
        masks.append((heads, channels))
    return Structure.from_masks(masks)


def even_structure(shape: ModelShape, heads: int = 2, channels: int = 20, seed: int = 0) -> Structure:
    """The same number of heads and channels in every layer, others in each."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(shape.layers):
        masks.append((rng.permutation(shape.heads) < heads, rng.permutation(shape.channels) < channels))
    return Structure.from_masks(masks)


def tokens(rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    ids[mask == 0] = 1
    return {"input_ids": ids, "attention_mask": mask}
