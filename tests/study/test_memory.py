"""The memory formula of a study against the tensors that autograd keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine.config import RunConfig
from fedspine.data.encode import Batch
from fedspine.lora.adapters import narrow, start_adapters
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.importance import MagnitudeScorer
from fedspine.pruning.select import select
from fedspine.structure import Structure
from fedspine.study.design import Cell
from fedspine.study.estimate import workload_for
from fedspine.study.memory import activation_bytes, training_bytes
from fedspine.training import batch_loss
from tests.tiny import tiny_config

ROWS, LENGTH, RANK, VOCABULARY = 2, 40, 4, 60
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def kept(family: str, task: str, dtype: torch.dtype, ratio: float) -> tuple[float, ResidentModel]:
    """(bytes per token that autograd keeps of one forward pass, weights aside; the model)."""
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    model = auto.from_config(tiny_config(family, vocab_size=VOCABULARY, **SIZES)).eval()
    model.config.use_cache = False
    resident = ResidentModel(model, family, RunConfig.lora_targets, RANK, 2.0, dtype)
    full = Structure.full(resident.shape)
    arrays = start_adapters(resident.shape, RANK, np.random.default_rng(0)) | resident.head_arrays()
    resident.mount(full, narrow(arrays, full, RANK, resident.shape))
    cut = select(full, MagnitudeScorer(resident).scores(), ratio, resident.shape)
    resident.mount(cut, narrow(arrays, cut, RANK, resident.shape))
    own = {each.untyped_storage().data_ptr() for each in resident.model.state_dict().values()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    ids = np.random.default_rng(1).integers(5, VOCABULARY, (ROWS, LENGTH))
    batch = Batch(ids, np.ones_like(ids), None, ids if task == "causal-lm" else np.arange(ROWS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = batch_loss(resident, batch)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in found.values()) / (ROWS * LENGTH), resident


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("level", ["none", "bf16"])
@pytest.mark.parametrize(
    ("family", "task"), [("bert", "classification"), ("llama", "classification"), ("llama", "causal-lm")]
)
def test_what_the_backward_pass_keeps_is_counted(family: str, task: str, level: str, ratio: float) -> None:
    found, resident = kept(family, task, torch.bfloat16 if level == "bf16" else torch.float32, ratio)
    config = RunConfig(task=task, max_length=LENGTH, batch_size=ROWS, min_rank=1)
    workload = workload_for(Cell({"compression": level}, 0), config, resident.shape)
    expected, gradients = activation_bytes(workload, ratio, RANK)
    log_probabilities = 4 * resident.shape.vocabulary  # counted with the gradients
    copies = workload.adapter_bytes(ratio, RANK) / 2 if level == "bf16" else 0.0
    assert found == pytest.approx(expected + log_probabilities + copies / (ROWS * LENGTH), rel=0.05)
    assert 0 < gradients < expected
    assert training_bytes(workload, ratio, RANK) > ROWS * LENGTH * expected + copies
