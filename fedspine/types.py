"""The frozen dataclasses that cross a boundary: what is planned, sent, reported and recorded.

Plain numbers and numpy arrays only, so that policies, records and the wire need no torch. Units are in the names:
`_seconds`, `_bytes`, `_ratio` in 0..1. Seconds of a `Report` are those of the device's cost meter: virtual in a
simulation, measured in a deployment; wall-clock fields are named `wall_` and kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedspine.structure import Structure

Array = NDArray[np.float32]
Arrays = Mapping[str, Array]
"""Adapter and head tensors by wire name: `<module>.A` [rank, d_in], `<module>.B` [d_out, rank], `head.<parameter>`;
`<module>.W` [d_out, d_in], what was folded into the frozen weight."""

Scores = tuple[tuple[Array, Array], ...]
"""Importance per layer: (per head [heads], per FFN channel [channels]), in base-model numbering; 0 where cut."""

TRAINED = "trained"
OUT_OF_MEMORY = "out_of_memory"
FAILED = "failed"


@dataclass(frozen=True)
class Action:
    """What the server decides for one device in one round."""

    pruning_ratio: float
    """Share of prunable parameters to have cut by the end of the round, 0..1 (a sparsity to reach, not a step)."""
    lora_rank: int
    iterations: int = 0
    """Local iterations; 0: as many as the configuration says."""
    layers: int = 0
    """Layers, counted from the top, whose adapters are trained; 0: all."""

    def steps(self, configured: int) -> int:
        """Local iterations, where `configured` is what the configuration says."""
        return self.iterations or configured

    def first_layer(self, layers: int) -> int:
        """The lowest layer whose adapters are trained, of a model with so many."""
        return layers - self.layers if self.layers else 0


@dataclass(frozen=True)
class Probe:
    """What a device measured at the start of a round, before its configuration was fixed."""

    seconds_per_flop: float
    seconds_per_byte: float
    """Latency taken out: the difference between a small and an empty transfer."""
    seconds: float
    """What the measurement itself cost the device."""
    bytes: int
    """Payload moved for it, both ways."""


@dataclass(frozen=True)
class Candidate:
    """One sampled device as the policy sees it."""

    device: int
    ratio: float
    """What is cut already."""
    min_ratio: float
    """Floor: what is cut already, or the schedule's ramp, whichever is larger."""
    max_ratio: float
    """Ceiling of this round; equal to `min_ratio` when nothing may be chosen."""
    ranks: tuple[int, ...]
    """Ranks the policy may choose from, ascending."""
    probe: Probe | None = None


@dataclass(frozen=True)
class Report:
    """What a device tells about its local round."""

    outcome: str
    """`trained`, `out_of_memory` or `failed`."""
    examples: int = 0
    """Size of the device's own training set: its weight in aggregation."""
    compute_seconds: float = 0.0
    download_seconds: float = 0.0
    upload_seconds: float = 0.0
    download_bytes: int = 0
    upload_bytes: int = 0
    loss_before: float = 0.0
    """On a fixed local probe batch, with the model as it was received."""
    loss_after: float = 0.0
    update_norm: float = 0.0
    """Frobenius norm of the change of all s*B@A, over the structures kept."""
    peak_memory_bytes: int = 0
    message: str = ""
    """Why it failed, if it did."""
    wall: Mapping[str, float] = field(default_factory=dict)
    """Wall time of the local work on the machine that did it: `seconds` in all, and by part."""
    rank_after: int = 0
    """Of the adapters that came back, the largest: that of the action, or less where the device dropped components."""
    module_salience: tuple[float, ...] = ()
    """How much the adapters of each projection matter, where ranks follow it (`controller/rank_budget.py`)."""

    @property
    def seconds(self) -> float:
        """Completion time: download, compute, upload."""
        return self.download_seconds + self.compute_seconds + self.upload_seconds


@dataclass(frozen=True)
class Pull:
    """One past decision and what came of it: all that a policy may learn from."""

    round: int
    device: int
    action: Action
    ratio_before: float
    ratio_after: float
    report: Report
    flops: float
    """Training FLOPs of the local round, by the model's cost formula (known to the server)."""
    probe: Probe | None = None
    quality: float = 0.0
    """The time-free part of the reward: loss improvement, pruning progress, update importance."""
    reward: float = 0.0

    @property
    def seconds(self) -> float:
        """From being asked to having replied, the probe included."""
        return self.report.seconds + (self.probe.seconds if self.probe else 0.0)


@dataclass(frozen=True)
class RoundRecord:
    """One line of `rounds.jsonl`. Equal seeds give equal records, the `wall` field aside."""

    round: int
    """1-based number of the finished round."""
    floor_ratio: float
    pulls: tuple[Pull, ...]
    """Of the replies that arrived in it: those of an earlier round were late."""
    round_seconds: float
    """Time of the slowest device of the round, on the run's clock; less where a round closes before (late.py), and also
    that of waiting for devices to be available and, in the first one, of a roll call."""
    clock_seconds: float
    """Sum of the round times so far."""
    waiting_seconds: float
    """Mean over the replies of the time from their arrival to the end of the round."""
    uploaded_bytes: int
    downloaded_bytes: int
    accuracy: float | None = None
    """Of the global model, cut by the server's own structure, after this round; None when not evaluated."""
    smoothed_accuracy: float | None = None
    """The same with the averaged adapters."""
    loss: float | None = None
    predicted_share: float | None = None
    """Share of the evaluation set that went to the most predicted class."""
    roll_call: Mapping[int, Probe] = field(default_factory=dict)
    """By device: what was measured before the first round. It is part of that round's time and bytes."""
    away: tuple[int, ...] = ()
    """Real devices that could not be asked: not connected, or at work on an earlier request after its deadline."""
    discarded: tuple[int, ...] = ()
    """Real devices whose answer to an earlier request came after its deadline, and was discarded."""
    wall: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainRequest:
    """What the server sends to one device for one round."""

    round: int
    device: int
    action: Action
    structure: Structure
    """Already cut to the first pruning step of the round."""
    arrays: Arrays
    """The global adapters, narrowed to the device's rank and structure, and the head."""
    scores: Scores | None
    """Importance to cut by inside the round; None when the round has no further cut."""
    settings: str
    """The run's complete configuration as JSON."""
    missed_rank: int = 0
    """Summed rank of what was folded into the frozen weights since the device last had a request."""


@dataclass(frozen=True)
class TrainReply:
    """What a device sends back. Arrays are empty unless the outcome is `trained`."""

    device: int
    report: Report
    structure: Structure
    arrays: Arrays
    scores: Scores | None


@dataclass(frozen=True)
class ProbeRequest:
    """Asks a device to time one local iteration and a small transfer before its configuration is fixed."""

    round: int
    device: int
    structure: Structure
    lora_rank: int
    settings: str


@dataclass(frozen=True)
class EvaluateRequest:
    """Asks a device to evaluate its own cut model with the given adapters."""

    round: int
    device: int
    structure: Structure
    arrays: Arrays
    settings: str


@dataclass(frozen=True)
class EvaluateReply:
    device: int
    examples: int
    accuracy: float
    loss: float
