"""The local loop: forward, backward, score, clip, step; and the loss of a batch or of a whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.nn import functional

from fedspine.data.encode import IGNORED, Batch
from fedspine.lora.adapters import HEAD
from fedspine.lora.resident import ResidentModel
from fedspine.stopwatch import Stopwatch
from fedspine.structure import Structure


class Learner(Protocol):
    """A model, where it is, and what is trained of it, by name."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...


AnyLearner = TypeVar("AnyLearner", bound=Learner)


def tensors(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, labels left out."""
    inputs = {
        "input_ids": torch.from_numpy(batch.input_ids).to(device),
        "attention_mask": torch.from_numpy(batch.attention_mask).to(device),
    }
    if batch.token_type_ids is not None:
        inputs["token_type_ids"] = torch.from_numpy(batch.token_type_ids).to(device)
    return inputs


def predictions(learner: Learner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, classes], what is right [n]): of rows, or of tokens, some of which may be `IGNORED`.

    A language model's head computes only those positions whose next token is learned in some row.
    """
    inputs, labels = tensors(batch, learner.device), torch.from_numpy(batch.labels).to(learner.device)
    if labels.ndim == 1:
        return learner.model(**inputs).logits, labels
    following = labels[:, 1:]
    columns = (following != IGNORED).any(0).nonzero().flatten()
    logits = learner.model(**inputs, logits_to_keep=columns).logits
    return logits.flatten(0, 1).float(), following[:, columns].flatten()


def batch_loss(learner: Learner, batch: Batch, shift: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy of a batch over its rows, or its learned tokens; differentiable. `shift`: added to logits."""
    logits, labels = predictions(learner, batch)
    logits = logits if shift is None else logits + shift.to(logits.device)
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED)


def evaluate(learner: Learner, batches: Iterable[Batch]) -> tuple[float, float, float]:
    """(accuracy, mean loss, share of the most predicted class) of the mounted model, over rows or learned tokens."""
    correct, loss, count = 0, 0.0, 0
    predicted: torch.Tensor | None = None
    with torch.inference_mode():
        for batch in batches:
            logits, labels = predictions(learner, batch)
            guess, known = logits.argmax(-1), labels != IGNORED
            correct += int((guess == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED))
            count += int(known.sum())
            counts = torch.bincount(guess[known], minlength=logits.shape[-1])
            predicted = counts if predicted is None else predicted + counts
    if predicted is None:
        return 0.0, 0.0, 0.0
    return correct / count, loss / count, float(predicted.max()) / count


class Penalty(Protocol):
    """A term beside the loss."""

    def add_gradients(self) -> None:
        """To those of the loss, before they are clipped."""

    def cut(self, structure: Structure) -> None:
        """The mounted model is about to be cut."""


class LocalOptimizer(Generic[AnyLearner]):
    """AdamW on the adapters and the head, gradients clipped; its moments survive a cut, sliced like the weights.

    `penalties`: terms beside the loss.
    """

    def __init__(
        self,
        learner: AnyLearner,
        learning_rate: float,
        clip_norm: float,
        penalties: Sequence[Penalty] = (),
        adapter_rate: float | None = None,
    ) -> None:
        """`adapter_rate`: the adapters' learning rate, where it is another than the head's."""
        self._learner = learner
        self._penalties = penalties
        self._learning_rate = learning_rate
        self._adapter_rate = learning_rate if adapter_rate is None else adapter_rate
        self._clip_norm = clip_norm
        self._optimizer = self._fresh()

    def step(self) -> None:
        """Add penalties, clip, update, and clear the gradients."""
        for penalty in self._penalties:
            penalty.add_gradients()
        torch.nn.utils.clip_grad_norm_(list(self._learner.parameters.values()), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def cut(self: LocalOptimizer[ResidentModel], structure: Structure) -> None:
        """Cut the mounted model; moments of what stays are kept, all at once."""
        resident = self._learner
        moments = {}
        for name, parameter in resident.parameters.items():
            keep = resident.still_kept(name, structure)
            state = self._optimizer.state.get(parameter, {})
            moments[name] = {
                key: value.index_select(keep[0], torch.from_numpy(keep[1]).to(value.device))
                if keep is not None and value.shape == parameter.shape
                else value
                for key, value in state.items()
            }
        self._optimizer.state.clear()
        for penalty in self._penalties:
            penalty.cut(structure)
        resident.cut(structure)
        self._optimizer = self._fresh()
        for name, parameter in resident.parameters.items():
            if moments[name]:
                self._optimizer.state[parameter] = moments[name]

    def _fresh(self) -> torch.optim.Optimizer:
        named = self._learner.parameters.items()
        heads = [parameter for name, parameter in named if name.startswith(HEAD)]
        adapters = [parameter for name, parameter in named if not name.startswith(HEAD)]
        groups = [{"params": adapters, "lr": self._adapter_rate}, {"params": heads, "lr": self._learning_rate}]
        return torch.optim.AdamW([each for each in groups if each["params"]], weight_decay=0.0, fused=True)


def tune(
    learner: Learner,
    optimizer: LocalOptimizer[Any],
    batches: Iterable[Batch],
    observe: Callable[[], None] | None = None,
    before_step: Callable[[int], None] | None = None,
    watch: Stopwatch | None = None,
    shift: torch.Tensor | None = None,
) -> None:
    """One optimiser step per batch. `before_step(i)` runs first (cuts); `observe` between backward and step.

    `shift` is added to the logits [classes].

    Importance that is taken from hooks counts as `backward`.
    """
    watch = watch or Stopwatch()
    for iteration, batch in enumerate(watch.drawing("data", batches)):
        with watch.part("cut"):
            if before_step:
                before_step(iteration)
        with watch.part("forward"):
            loss = batch_loss(learner, batch, shift)
        with watch.part("backward"):
            torch.autograd.backward(loss)
            del loss  # its graph: not beside that of the next step
        with watch.part("score"):
            if observe:
                observe()
        with watch.part("optimiser"):
            optimizer.step()
