"""A model as one ONNX graph, checked against torch. Needs the extra `onnx`."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedspine.errors import ModelError
from fedspine.pruning.families import family_of

FILE = "model.onnx"
TOLERANCE = 1e-4
"""Of a logit, absolute, or relative where it is larger than 1."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
Inputs = dict[str, torch.Tensor]


def check_onnx() -> None:
    """Errors: `ModelError` where a library is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"--onnx needs {', '.join(missing)}; install with `pip install 'fedspine[onnx]'`")


def save_onnx(model: PreTrainedModel, folder: Path, batches: Sequence[Inputs]) -> float:
    """Write model.onnx into `folder`; the largest difference of its logits from torch's, over `batches`.

    Inputs are those of the first batch, all int64 [rows, length] with any number of rows and tokens; the output is
    `logits`. A language model has no cache of keys and values there.
    Errors: `ModelError` when the graph cannot be made, or gives other logits than torch.
    """
    family = model.config.model_type
    names = list(batches[0])
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length")}
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            torch.onnx.export(
                _Logits(model, names, cache=family_of(family).decoder),
                tuple(batches[0].values()),
                folder / FILE,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=((sizes,) * len(names),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"--onnx: family '{family}' cannot be exported to ONNX: {reason}; leave out --onnx") from None
    difference = _difference(model, folder / FILE, batches)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"--onnx: {FILE} gives other logits than torch, by up to {difference:.2g} (allowed: {TOLERANCE:g}); "
            "leave out --onnx"
        )
    return difference


def _difference(model: PreTrainedModel, path: Path, batches: Sequence[Inputs]) -> float:
    """Largest difference of a logit of a token (or text) that is no padding, in units of its size if above 1."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in batches:
        found = torch.from_numpy(session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})[0])
        with torch.inference_mode():
            wanted = model(**batch).logits
        difference = (found - wanted).abs() / wanted.abs().clamp(min=1.0)
        if wanted.ndim == 3:
            difference = difference[batch["attention_mask"] == 1]
        largest = max(largest, float(difference.max()))
    return largest


class _Logits(nn.Module):
    """The logits alone, of inputs by position."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], cache: bool) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.settings = {"use_cache": False} if cache else {}

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), **self.settings).logits
        return found
