"""What a local round costs: training FLOPs, bytes on the wire, memory. One formula for client, server and clock.

FLOPs follow the standard count for a transformer layer with frozen base weights and adapters: forward plus the
gradient with respect to inputs is twice the forward; adapters add three times their own forward, or two and a half
where one factor is fixed. Gradient checkpointing adds one more forward of both. Tokens are counted as
`batch_size * max_length` in every layer, the static shape an edge runtime computes, so that a cost depends on the
configuration alone. A language model's loss counts as the FLOPs that take as long. A simulation computes less: rows
are padded to their batch's longest only, and the last layer of BERT-like classifiers computes the one token that the
head reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.structure import ModelShape, Structure
from fedspine.types import Action

FLOAT_BYTES = 4
LOSS_FLOPS = 1000
"""Of a logit of a language model: its log-probability and gradient, bound by memory, take as long as so many FLOPs of a
matrix product. On a CPU 600 to 900 in float32 and 1,900 in bfloat16: two shapes of `benchmarks/estimator.py --time`."""

Number = TypeVar("Number", float, NDArray[np.float64])


@dataclass(frozen=True)
class Workload:
    """Cost formulas of one run: the model's counts and the local round's size."""

    shape: ModelShape
    local_iterations: int
    batch_size: int
    length: int
    """Tokens per sequence."""
    score_bytes: int = 0
    """Importance scores that a device uploads with its adapters."""
    gradient_checkpointing: bool = False
    """Whether the activations inside a layer are computed again in the backward pass."""
    trained_share: float = 1.0
    """Of the adapters' values, that are trained: half where one factor is fixed."""
    upload_share: float = 1.0
    """Of the adapters' values, that a device sends."""
    download_share: float = 1.0
    """Of the adapters' values, that a device is sent."""
    head_shared: bool = True
    """Whether the task head travels."""
    wire_bytes: float = FLOAT_BYTES
    """Of a value of adapters and head on the wire."""
    frozen_bytes: float = FLOAT_BYTES
    """Of a frozen weight."""
    activation_bytes: float = FLOAT_BYTES
    """Of a value that is kept for the backward pass."""
    prefix: int = 0
    """Keys and values of every layer that no token computes: attention sees them too."""

    def iteration_flops(
        self, counts: tuple[tuple[float, float], ...], rank: int | tuple[int, ...], first_layer: int = 0
    ) -> float:
        """Training FLOPs of one local iteration.

        `counts`: kept (heads, channels) per layer; fractions are allowed for planning. `rank`: of all projections, or
        of each. `first_layer`: the lowest whose adapters are trained; those below compute forward only.
        """
        base, adapters, head = self._forward_flops(counts, rank)
        below = 0.0
        if first_layer:
            all_base, all_adapters = base, adapters
            base, adapters, _ = self._forward_flops(counts, rank, first_layer)
            below = all_base - base + all_adapters - adapters
        again = int(self.gradient_checkpointing)
        loss = LOSS_FLOPS * self.batch_size * self.length * self.shape.vocabulary
        return (2 + again) * base + 2 * head + (2 + self.trained_share + again) * adapters + loss + below

    def inference_flops(self, counts: tuple[tuple[float, float], ...], rank: int = 0) -> float:
        """FLOPs of a forward pass over one batch; rank 0: without adapters."""
        return sum(self._forward_flops(counts, rank))

    def _forward_flops(
        self, counts: tuple[tuple[float, float], ...], rank: int | tuple[int, ...], first_layer: int = 0
    ) -> tuple[float, float, float]:
        """Of a batch, from a layer on: (frozen layers, adapters, language model's head)."""
        tokens = self.batch_size * self.length
        shape = self.shape
        base = 0.0
        adapters = 0.0
        for heads, channels in counts[first_layer:]:
            base += 2 * tokens * (heads * shape.head_weights + channels * shape.channel_weights)
            base += 4 * tokens * (self.length + self.prefix) * heads * shape.head_dim
        ranks = rank if isinstance(rank, tuple) else (rank,) * len(shape.modules)
        for module, components in zip(shape.modules, ranks, strict=True):
            if module.layer < first_layer:
                continue
            heads, channels = counts[module.layer]
            kept = (heads if module.unit == "heads" else channels) * module.unit_size
            other = module.d_in if module.axis == "rows" else module.d_out
            adapters += 2 * tokens * components * (kept + other)
        return base, adapters, 2 * tokens * shape.hidden * shape.vocabulary

    def weight_gradient_flops(self, counts: tuple[tuple[float, float], ...]) -> float:
        """FLOPs that the gradients of the frozen weights add to an iteration: only Taylor scores need them."""
        shape = self.shape
        weights = sum(heads * shape.head_weights + channels * shape.channel_weights for heads, channels in counts)
        return 2 * self.batch_size * self.length * weights

    def round_flops(self, structure: Structure, rank: int) -> float:
        """Training FLOPs of a local round on a cut model."""
        return self.local_iterations * self.iteration_flops(structure.counts(), rank)

    def share(self, action: Action) -> float:
        """Of the configured local iterations, that a device is given."""
        return action.steps(self.local_iterations) / self.local_iterations

    def flops_share(self, action: Action) -> float:
        """Of the FLOPs of a configured local round at the same ratio and rank, that a device is given."""
        return self.share(action) * self.layers_share(action)

    def layers_share(self, action: Action) -> float:
        """Of the FLOPs of an iteration, with the adapters of the action's layers only; cuts hardly change it."""
        if not action.layers:
            return 1.0
        every = self.planned_counts(0.0)
        first = action.first_layer(self.shape.layers)
        return self.iteration_flops(every, action.lora_rank, first) / self.iteration_flops(every, action.lora_rank)

    def planned_flops(self, ratio: Number, rank: Number) -> Number:
        """The same for a pruning ratio that is spread evenly over layers, heads and channels; also of arrays."""
        fixed, base, cut, uncut = self._flops_terms
        keep = 1.0 - ratio
        return fixed + base * keep + rank * (cut * keep + uncut)

    def adapter_bytes(self, ratio: Number, rank: Number, share: float = 1.0) -> Number:
        """Bytes of the float32 adapters (or a share of them) and head at an evenly spread ratio; also of arrays."""
        cut, uncut = self._adapter_terms
        return FLOAT_BYTES * rank * (cut * (1.0 - ratio) + uncut) * share + self.shape.head_bytes

    def planned_bytes(self, ratio: Number, rank: Number) -> Number:
        """Bytes both ways: adapters down and up, the structure, the scores up; also of arrays."""
        adapters = self.download_bytes(ratio, rank) + self.upload_bytes(ratio, rank)
        return adapters + 2 * self.structure_bytes + self.score_bytes

    def download_bytes(self, ratio: Number, rank: Number) -> Number:
        """Of adapters and head, to a device."""
        return self._on_the_wire(self.adapter_bytes(ratio, rank, self.download_share))

    def upload_bytes(self, ratio: Number, rank: Number) -> Number:
        """Of adapters and head, from a device."""
        return self._on_the_wire(self.adapter_bytes(ratio, rank, self.upload_share))

    def change_bytes(self, rank: int) -> int:
        """Of a change of the frozen weights that has this rank: as factors, or as a matrix where that is smaller."""
        return FLOAT_BYTES * sum(min(rank * (m.d_out + m.d_in), m.d_out * m.d_in) for m in self.shape.modules)

    def change_flops(self, rank: int) -> int:
        """FLOPs of adding it: of the product of the factors, or of a sum of matrices."""
        return sum(
            m.d_out * m.d_in * (2 * rank if rank * (m.d_out + m.d_in) < m.d_out * m.d_in else 1)
            for m in self.shape.modules
        )

    def mean_rank(self, ranks: tuple[int, ...]) -> float:
        """The rank at which all projections together have as many values as each at its own."""
        sizes = [module.d_out + module.d_in for module in self.shape.modules]
        return sum(rank * size for rank, size in zip(ranks, sizes, strict=True)) / sum(sizes)

    def _on_the_wire(self, values: Number) -> Number:
        """From bytes in float32, head included."""
        unshared = 0 if self.head_shared else self.shape.head_bytes
        return self.wire_bytes / FLOAT_BYTES * (values - unshared)

    @property
    def structure_bytes(self) -> int:
        """Bytes of a structure on the wire."""
        return self.shape.layers * ((self.shape.heads + 7) // 8 + (self.shape.channels + 7) // 8)

    def memory_bytes(self, structure: Structure, rank: float, first_layer: int = 0) -> float:
        """Training memory: weights, adapters with gradient and two Adam moments, activations.

        Activations per layer are about 17 values per token and hidden unit (scaled by what is kept), plus the
        attention matrix of every kept query head. With gradient checkpointing these are there for one layer at a time,
        the largest at worst, and for the others only the input. `first_layer`: the lowest whose adapters are trained;
        those below keep nothing for a backward pass.
        """
        return self._memory(structure.counts(), structure.sparsity(self.shape), rank, first_layer)

    def planned_memory_bytes(self, ratio: float, rank: int) -> float:
        """The same for a pruning ratio that is spread evenly over layers, heads and channels."""
        return self._memory(self.planned_counts(ratio), ratio, rank)

    def inference_bytes(self, ratio: float, rank: int = 0) -> float:
        """Memory of answering a batch: weights, adapters, and what one layer holds at a time."""
        counts = self.planned_counts(ratio)
        values = self.shape.hidden + self._values_in_layer(*counts[0]) + self.shape.vocabulary
        activations = self.activation_bytes * self.batch_size * self.length * values
        return self._weight_bytes(ratio) + self.adapter_bytes(ratio, rank) + activations

    def planned_counts(self, ratio: float) -> tuple[tuple[float, float], ...]:
        """(heads, channels) per layer at an evenly spread ratio."""
        shape, keep = self.shape, 1.0 - ratio
        return ((keep * shape.heads, keep * shape.channels),) * shape.layers

    def _weight_bytes(self, sparsity: float) -> float:
        shape = self.shape
        return self.frozen_bytes * (shape.total_parameters - sparsity * shape.prunable_parameters)

    def _memory(
        self, counts: tuple[tuple[float, float], ...], sparsity: float, rank: float, first_layer: int = 0
    ) -> float:
        """With these (heads, channels) left per layer, which is `sparsity` of the prunable parameters cut."""
        shape = self.shape
        tokens = self.batch_size * self.length
        trained = shape.layers - first_layer
        share = self.trained_share * trained / shape.layers
        adapters = self.adapter_bytes(sparsity, rank) + 3 * self.adapter_bytes(sparsity, rank, share)
        inside = [self._values_in_layer(heads, channels) for heads, channels in counts[first_layer:]]
        values = trained * shape.hidden + max(inside) if self.gradient_checkpointing else sum(inside)
        logits = FLOAT_BYTES * 2 * shape.vocabulary  # and their gradient: the loss is taken in float32
        activations = tokens * (self.activation_bytes * values + logits)
        return self._weight_bytes(sparsity) + adapters + activations

    def _values_in_layer(self, heads: float, channels: float) -> float:
        """Values per token that a layer keeps for its backward pass."""
        shape = self.shape
        kept = heads * shape.head_parameters + channels * shape.channel_parameters
        keep = kept * shape.layers / shape.prunable_parameters
        return shape.hidden * (5 + 12 * keep) + 2 * heads * shape.queries * (self.length + self.prefix)

    @cached_property
    def _flops_terms(self) -> tuple[float, float, float, float]:
        """FLOPs of a round are fixed + base * keep + rank * (cut * keep + uncut): the formula at four points."""

        def at(keep: float, rank: int) -> float:
            even = ((self.shape.heads * keep, self.shape.channels * keep),) * self.shape.layers
            return self.local_iterations * self.iteration_flops(even, rank)

        fixed = at(0.0, 0)
        base, uncut = at(1.0, 0) - fixed, at(0.0, 1) - fixed
        return fixed, base, at(1.0, 1) - fixed - base - uncut, uncut

    @cached_property
    def _adapter_terms(self) -> tuple[int, int]:
        """Values of rank-1 adapters that go with what is cut, and that stay."""
        shape = self.shape
        cut = sum(
            (shape.heads if module.unit == "heads" else shape.channels) * module.unit_size for module in shape.modules
        )
        return cut, sum(module.d_in if module.axis == "rows" else module.d_out for module in shape.modules)


def workload_of(config: RunConfig, shape: ModelShape) -> Workload:
    """The cost formulas of a run."""
    scores = FLOAT_BYTES * shape.layers * (shape.heads + shape.channels) if config.target_sparsity > 0 else 0
    factors = config.trained_factors
    return Workload(
        shape,
        config.local_iterations,
        config.batch_size,
        config.max_length,
        scores,
        config.gradient_checkpointing,
        trained_share=0.5 if factors in ("b", "alternate") else 1.0,
        upload_share=1.0 if factors == "both" else 0.5,
        download_share=0.0 if config.fold == "all" else 0.5 if factors in ("b", "local-b") else 1.0,
        head_shared=factors != "local-b",
        wire_bytes=FLOAT_BYTES / 2 if config.wire_dtype == "float16" else FLOAT_BYTES,
    )
