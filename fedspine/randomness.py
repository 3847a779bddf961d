"""Every draw of a run: a generator made from the run's seed, the round, the device and a purpose."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a generator is for, so that no two uses share a stream."""

    SAMPLE_DEVICES = 1
    POLICY = 2
    BATCHES = 3
    PROBE_BATCH = 4
    ADAPTERS = 5
    EVALUATE_DEVICES = 6
    SURFACE = 7
    BATCH_ORDER = 8
    PUBLIC_ROWS = 9
    DISTILL = 10


def generator(seed: int, round: int, device: int, purpose: Purpose) -> np.random.Generator:
    return np.random.default_rng([seed, round, device, int(purpose)])
