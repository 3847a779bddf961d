"""Logit adjustment against label skew: log of the class prior on top of the logits, in training only.

Source: arXiv 2007.07314 (its softmax cross-entropy loss), with each device's own prior. A device that has mostly one
class would learn to answer with it; with the prior added, that answer is already there, and what it learns is what
speaks for a class beyond its frequency. The prior never leaves the device.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

SMOOTHING = 0.02
"""Added to every prior: a class that a device does not have is only unlikely."""


def logit_shift(labels: NDArray[np.int64], classes: int, strength: float) -> torch.Tensor | None:
    """What is added to the training logits of a device with these labels [classes]; None where it is nothing.

    A language model has no `classes`.
    """
    if not (strength and classes):
        return None
    prior = np.bincount(labels, minlength=classes) / len(labels)
    return torch.from_numpy((strength * np.log(prior + SMOOTHING)).astype(np.float32))
