"""`fedspine export`: a run's model as a folder that can be used without the run."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from fedspine.artifact import ADAPTER, assembled, load_model, save_adapter, save_model
from fedspine.benchmark import alternate
from fedspine.checkpoint import FILE, load_state
from fedspine.config import RunConfig, saved_config
from fedspine.data.encode import evaluation_batches
from fedspine.data.language import prompt_text
from fedspine.errors import CheckpointError, ConfigError
from fedspine.final import device_arrays
from fedspine.lora.adapters import narrow
from fedspine.lora.factors import completed
from fedspine.model import load_base, load_tokenizer, model_source
from fedspine.onnx_file import check_onnx, save_onnx
from fedspine.report.card import Exported, Measured, card, shown_name
from fedspine.report.records import write_atomically
from fedspine.run_directory import free_directory
from fedspine.structure import Structure
from fedspine.training import evaluate, tensors
from fedspine.types import Arrays
from fedspine.workbench import Workbench, workbench

REPEATS = 15
"""Forward passes of each model whose latency is measured."""
TEXT, QUESTION = "Once upon a time", "What is a leaf?"
"""What the card gives a language model to begin with."""


@dataclass(frozen=True)
class ExportResult:
    """What an export left."""

    directory: Path
    stock: bool
    """Whether transformers loads it by itself; otherwise `fedspine.load_model` does."""
    measured: Measured
    sparsity: float
    """Share of the prunable parameters that is cut."""


def export(
    run: str | Path, *, out: str | Path, device: int | None = None, merge: bool = False, onnx: bool = False
) -> ExportResult:
    """Write the tuned and cut model of a run directory into the new folder `out`, with a model card, in float32.

    `device`: the number of the device whose own cut model it is; None for the global model, which is cut to the
    structure that the devices agree on. The adapters are the averaged ones, at the server's rank; of a device that
    has some of its own, these.
    `merge`: fold the adapters into the weights; otherwise they are a PEFT adapter in `out`/adapter.
    `onnx`: write model.onnx too, in any case with the adapters folded in.

    The folder is complete or absent. Model and data of the run must still be there: the model is evaluated.
    Errors: subclasses of `FedSpineError`, before anything is written.
    """
    directory = Path(run)
    config = _config_of(directory, device)
    target = free_directory(out, "model", resumable=False).resolve()
    summary = _summary_of(directory)
    if onnx:
        check_onnx()
    workbench.cache_clear()  # files may have changed since the last run of this process
    bench = workbench(replace(config, dtype="float32", torch_device="cpu").to_json())
    state = load_state(directory, config, bench.shape)
    if device is None:
        structure = state.consensus
        arrays: Arrays = narrow(state.final, structure, config.max_rank, bench.shape)
    else:
        structure = state.structures.get(device, Structure.full(bench.shape))
        arrays = device_arrays(config, state, device, structure, bench.shape)
        arrays = completed(arrays, bench.start, structure, bench.shape)
    with _staged(target) as folder:
        stock = _write(bench, arrays, structure, merge, folder)
        model: Any = load_model(folder)
        if not merge:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name of the past
                model = PeftModel.from_pretrained(model, str(folder / ADAPTER)).eval()
        if onnx:
            _write_onnx(bench, arrays, structure, folder)
        measured = _measured(bench, model, sum(path.stat().st_size for path in folder.rglob("*.safetensors")))
        tokenizer = load_tokenizer(config)
        exported = Exported(
            config=config,
            summary=summary,
            round=state.round,
            classes=bench.data.classes,
            prompt=prompt_text(tokenizer, QUESTION) if bench.data.test.pairs else TEXT,
            chat=bool(bench.data.test.pairs and tokenizer.chat_template),
            shape=bench.shape,
            structure=structure,
            device=device,
            merged=merge,
            stock=stock,
            onnx=onnx,
            folder=target.name,
            measured=measured,
        )
        write_atomically(folder / "README.md", card(exported).encode())
    return ExportResult(target, stock, measured, structure.sparsity(bench.shape))


def _config_of(directory: Path, device: int | None) -> RunConfig:
    if not (directory / "config.toml").is_file():
        reason = "it holds no config.toml" if directory.is_dir() else "there is no such directory"
        raise CheckpointError(f"{directory} is no run directory: {reason}; name one that `fedspine simulate` wrote")
    if not (directory / FILE).is_file():
        raise CheckpointError(
            f"{directory} has no checkpoint ({FILE}): there is no model to export before the first round is done"
        )
    config = saved_config(directory)
    if device is not None and not 0 <= device < config.devices:
        raise ConfigError(f"device = {device}: the run has devices 0 to {config.devices - 1}")
    return config


def _summary_of(directory: Path) -> Mapping[str, Any]:
    """Of a finished run; empty before."""
    path = directory / "summary.json"
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return found


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when all went well, and is gone otherwise."""
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mounted(bench: Workbench, arrays: Arrays, structure: Structure, merge: bool) -> dict[str, torch.Tensor]:
    """The weights of the cut model, with the adapters (narrow) folded in or not."""
    bench.resident.mount(structure, arrays, merge=merge)
    return bench.resident.weights()


def _write(bench: Workbench, arrays: Arrays, structure: Structure, merge: bool, folder: Path) -> bool:
    """Weights, configuration, tokenizer and adapter; whether transformers can read them by itself."""
    config = bench.config
    weights = _mounted(bench, arrays, structure, merge)
    base, generation = shown_name(config.model), _generation(config)
    stock = save_model(folder, weights, _settings(bench), config.task, structure.counts(), base, generation)
    load_tokenizer(config).save_pretrained(folder)
    if not merge:
        save_adapter(folder / ADAPTER, arrays, weights, bench.shape, config.lora_scale, config.task)
    return stock


def _write_onnx(bench: Workbench, arrays: Arrays, structure: Structure, folder: Path) -> None:
    weights = _mounted(bench, arrays, structure, merge=True)
    model = assembled(weights, _settings(bench), bench.config.task, structure.counts())
    longest = bench.test.take(np.resize(np.argsort(-bench.test.lengths, kind="stable"), 5))  # rows repeat if too few
    batches = [*evaluation_batches(longest, 3, bench.pad_id), *evaluation_batches(_median_row(bench), 1, bench.pad_id)]
    save_onnx(model, folder, [tensors(batch, torch.device("cpu")) for batch in batches])


def _settings(bench: Workbench) -> PretrainedConfig:
    """The uncut model's own configuration, with the names of the classes and the padding of the run."""
    names: dict[str, Any] = {}
    if bench.config.task == "classification":
        names["id2label"] = dict(enumerate(bench.data.classes))
        names["label2id"] = {name: number for number, name in enumerate(bench.data.classes)}
    settings = AutoConfig.from_pretrained(model_source(bench.config.model), **names)
    settings.pad_token_id = bench.pad_id
    return settings


def _generation(config: RunConfig) -> GenerationConfig | None:
    if config.task != "causal-lm":
        return None
    try:
        return GenerationConfig.from_pretrained(model_source(config.model))
    except OSError:  # the base has none
        return None


def _measured(bench: Workbench, model: nn.Module, file_bytes: int) -> Measured:
    """Loss and accuracy on the evaluation set, and size and latency beside the uncut base."""
    resident = copy(bench.resident)
    resident.model = model  # evaluated as what was mounted would be
    accuracy, loss, *_ = evaluate(resident, bench.evaluation_batches(bench.test))
    base, _ = load_base(bench.config, len(bench.data.classes), bench.pad_id)
    row = _median_row(bench)
    inputs = tensors(next(evaluation_batches(row, 1, bench.pad_id)), torch.device("cpu"))
    with torch.inference_mode():
        own, bases = alternate([partial(each, **inputs) for each in (model, base)], REPEATS, step=lambda _: None)
    return Measured(
        accuracy=accuracy,
        loss=loss,
        examples=len(bench.test),
        parameters=sum(p.numel() for name, p in model.named_parameters() if "original_module" not in name),
        base_parameters=bench.shape.total_parameters,
        file_bytes=file_bytes,
        milliseconds=1000 * statistics.median(own),
        base_milliseconds=1000 * statistics.median(bases),
        speedup=statistics.median(slow / fast for fast, slow in zip(own, bases, strict=True)),
        tokens=int(row.lengths[0]),
        repeats=REPEATS,
        threads=torch.get_num_threads(),
        cpus=os.cpu_count() or 1,
        torch_version=torch.__version__,
    )


def _median_row(bench: Workbench) -> Any:
    """The evaluation text of median length."""
    return bench.test.take(np.argsort(bench.test.lengths, kind="stable")[[len(bench.test) // 2]])
