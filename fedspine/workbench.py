"""What stays in a process between rounds: base model, tokenizer and encoded data, keyed by the configuration.

So only adapters and structures travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.cost import Workload, workload_of
from fedspine.data.encode import Batch, Encoded, encode, evaluation_batches, training_batches
from fedspine.data.language import encode_language
from fedspine.data.prepared import PreparedData, Rows, find, prepare
from fedspine.devices.population import population_of
from fedspine.devices.profiles import Population
from fedspine.lora.adapters import start_adapters
from fedspine.lora.resident import ResidentModel
from fedspine.model import load_base, load_tokenizer
from fedspine.pruning.families import projections
from fedspine.published import reader_of
from fedspine.randomness import Purpose, generator
from fedspine.structure import ModelShape
from fedspine.types import (
    Arrays,
)

EVALUATION_BATCH = 64
MOST_LOGITS = 2**25
"""That an evaluation batch of a language model may have: 128 MB in float32."""
DEVICES_KEPT = 128
"""Devices whose rows stay tokenized in a process."""


@dataclass
class Workbench:
    """All that stays in a process for one configuration."""

    config: RunConfig
    data: PreparedData
    test: Encoded
    of_device: Callable[[int], Encoded]
    """The training rows of a device."""
    resident: ResidentModel
    population: Population
    pad_id: int
    public: Encoded | None = None
    """Texts to distil on, where the run does."""

    @property
    def shape(self) -> ModelShape:
        return self.resident.shape

    @property
    def workload(self) -> Workload:
        return workload_of(self.config, self.shape)

    @cached_property
    def start(self) -> Arrays:
        """Adapters that change nothing yet, in full coordinates, and the head as it was loaded: every machine's."""
        rng = generator(self.config.seed, 0, 0, Purpose.ADAPTERS)
        return start_adapters(self.shape, self.config.max_rank, rng) | self.resident.head_arrays()

    def training_batches(self, device: int, round: int, iterations: int) -> Iterator[Batch]:
        """The mini-batches of a device's local round; all devices of a round take the same turns."""
        seed = self.config.seed
        rng = generator(seed, round, device, Purpose.BATCHES)
        turns = generator(seed, round, 0, Purpose.BATCH_ORDER)
        return training_batches(self.of_device(device), self.config.batch_size, iterations, rng, self.pad_id, turns)

    def evaluation_batches(self, rows: Encoded, most: int = EVALUATION_BATCH) -> Iterator[Batch]:
        """Every row once, at most `most` together."""
        logits_of_row = self.config.max_length * max(1, self.shape.vocabulary)
        return evaluation_batches(rows, max(1, min(most, MOST_LOGITS // logits_of_row)), self.pad_id)


def configure_threads(threads: int) -> None:
    """Torch threads of this process: matrix products differ in their last bit between thread counts."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def resident_of(model: Any, family: str, config: RunConfig) -> ResidentModel:
    """Take over a fresh model as the configuration says."""
    weights = [f"{module.name}.weight" for module in projections(model, family)]
    return ResidentModel(
        model,
        family,
        config.lora_targets,
        config.max_rank,
        config.lora_scale,
        getattr(torch, config.dtype),
        config.torch_device,
        config.gradient_checkpointing,
        reader_of(config.model, model.base_model_prefix, weights),
    )


@lru_cache(maxsize=1)
def workbench(settings: str) -> Workbench:
    """Load model and data for a configuration (JSON) once per process.

    Errors: `DataError`, `ModelError`, `PopulationError`.
    """
    config = RunConfig.from_json(settings)
    configure_threads(config.threads)
    population = population_of(config)
    tokenizer = load_tokenizer(config)
    data = find(settings) or prepare(config)
    pad_id = tokenizer.pad_token_id or 0

    def tokens(rows: Rows, index: NDArray[np.int64]) -> Encoded:
        pairs = rows.pairs.take(index) if rows.pairs else None
        encoder = encode_language if config.task == "causal-lm" else encode
        return encoder(tokenizer, rows.texts.take(index), pairs, rows.labels[index], config.max_length)

    return Workbench(
        config=config,
        data=data,
        resident=resident_of(*load_base(config, len(data.classes), pad_id), config),
        test=tokens(data.test, np.arange(len(data.test))),
        of_device=lru_cache(DEVICES_KEPT)(lambda device: tokens(data.train, data.owned[device])),
        population=population,
        pad_id=pad_id,
        public=tokens(data.train, data.public) if len(data.public) else None,
    )
