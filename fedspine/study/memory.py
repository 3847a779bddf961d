"""Memory that training takes at its peak, counted from what this code keeps for the backward pass.

The formula of the virtual devices (`Workload.memory_bytes`) is one line for all models. This one knows, per token:

- layer: inputs and outputs of both norms, q, k, v and the output of attention, and of an FFN channel the outputs of
  every projection into it, of the activation function and of the product of the two where it is gated;
- attention matrices: none in float32, where attention is fused; in bfloat16 one, and in decoders also its softmax in
  float32 (`fedspine/lora/resident.py`);
- decoders in bfloat16 keep the inputs of their norms in float32;
- the last layer of BERT and its kin keeps its input, k and v only: the head reads the first token;
- on top, the larger of two moments of the backward pass: the gradients inside the last layer, or, of a language model,
  the log-probabilities with two gradients, in float32.

Against measured peaks: `benchmarks/estimator.py`, with its figures in `benchmarks/NOTES.md`.
"""

from __future__ import annotations

from fedspine.cost import FLOAT_BYTES, Workload


def training_bytes(workload: Workload, ratio: float, rank: int) -> float:
    """Weights, adapters with gradients and two Adam moments, activations; `ratio` of heads and channels is cut."""
    shape, tokens = workload.shape, workload.batch_size * workload.length
    adapters = workload.adapter_bytes(ratio, rank) + 3 * workload.adapter_bytes(ratio, rank, workload.trained_share)
    if workload.activation_bytes < FLOAT_BYTES:  # a copy to compute with
        adapters += workload.adapter_bytes(ratio, rank) * workload.activation_bytes / FLOAT_BYTES
    weights = workload.frozen_bytes * (shape.total_parameters - ratio * shape.prunable_parameters)
    return weights + adapters + tokens * sum(activation_bytes(workload, ratio, rank))


def activation_bytes(workload: Workload, ratio: float, rank: int) -> tuple[float, float]:
    """Per token: (kept for the backward pass, of gradients on top of it)."""
    from fedspine.pruning.families import family_of

    shape, value = workload.shape, workload.activation_bytes
    family = family_of(shape.family)
    hidden, keep, halved = shape.hidden, 1.0 - ratio, value < FLOAT_BYTES
    attended = keep * shape.heads * shape.head_dim
    inside = shape.channel_weights / hidden - 1  # projections into a channel: two where it is gated
    channels = 2 * inside * keep * shape.channels
    seen = 1.0 + workload.prefix / workload.length  # keys and values that are there, for one of the text's
    matrix = keep * shape.heads * shape.queries * workload.length * seen * value if halved else 0.0
    if family.decoder and halved:
        matrix *= 1 + FLOAT_BYTES / value
    norm_input = hidden * (FLOAT_BYTES if family.decoder else value)
    thin = rank * len(shape.modules) / shape.layers
    layer = value * (2 * hidden + (2 + 2 * seen) * attended + channels + thin) + 2 * norm_input + matrix
    first_only = family.first_token is not None
    last = value * (hidden + 2 * seen * attended) if first_only else layer
    kept = (shape.layers - 1) * layer + last
    if workload.gradient_checkpointing:
        kept = shape.layers * value * hidden + layer
    if family.decoder:  # the norm before the head, and what a classifier reads
        kept += norm_input + (0 if shape.vocabulary else FLOAT_BYTES * hidden)
    return kept, max(value * (hidden + channels / 2) + matrix, 3 * FLOAT_BYTES * shape.vocabulary)
