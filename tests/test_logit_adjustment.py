"""Training logits with the local class prior."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fedspine.data.encode import Batch
from fedspine.logit_adjustment import logit_shift
from fedspine.structure import Structure
from fedspine.training import batch_loss, predictions
from tests.tiny import random_arrays, tiny_resident, tokens

LABELS = np.array([0, 0, 0, 2], dtype=np.int64)


def test_the_shift_is_the_log_of_the_smoothed_prior() -> None:
    shift = logit_shift(LABELS, 3, 2.0)
    assert shift is not None
    np.testing.assert_allclose(shift.numpy(), 2.0 * np.log([0.77, 0.02, 0.27]), rtol=1e-6)
    assert logit_shift(LABELS, 3, 0.0) is None


def test_the_loss_is_that_of_the_shifted_logits() -> None:
    resident = tiny_resident()
    resident.mount(Structure.full(resident.shape), random_arrays(resident))
    inputs = tokens()
    batch = Batch(inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), None, LABELS[1:])
    shift = logit_shift(LABELS, 3, 1.0)
    logits, labels = predictions(resident, batch)
    weights = torch.tensor([0.77, 0.02, 0.27])
    share = logits.exp() * weights  # the softmax of a prior times a likelihood
    expected = -(share / share.sum(1, keepdim=True)).log()[torch.arange(3), labels].mean()
    torch.testing.assert_close(batch_loss(resident, batch, shift), expected)
    torch.testing.assert_close(batch_loss(resident, batch), functional.cross_entropy(logits, labels))


def test_only_classes_have_a_prior() -> None:
    assert logit_shift(np.zeros((2, 3), dtype=np.int64), 0, 1.0) is None
