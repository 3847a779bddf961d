"""A cut model as a folder: what `fedspine export` writes and `fedspine.load_model` reads.

Where the family's own configuration can say what is left (the same number of heads and channels in every layer, and
heads whose size does not follow from their number), the folder is one that transformers reads by itself. Elsewhere
config.json is that of the uncut model, and fedspine.json says what every layer keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from fedspine.errors import ModelError
from fedspine.model import model_source, quiet
from fedspine.pruning.families import family_of, head_counters, projections
from fedspine.report.records import write_atomically
from fedspine.structure import ModelShape, ModuleShape
from fedspine.types import Arrays

FILE = "fedspine.json"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter"
"""The folder, inside a model's, of a PEFT adapter."""
FORMAT = "fedspine-model-1"
Counts = Sequence[tuple[int, int]]
"""(kept heads or KV groups, kept FFN channels) per layer."""
_TASKS = {
    "classification": (AutoModelForSequenceClassification, "SEQ_CLS"),
    "causal-lm": (AutoModelForCausalLM, "CAUSAL_LM"),
}
"""The class of transformers, and what PEFT calls the task."""
_CHANNELS = ("intermediate_size", "hidden_dim")
"""What families call the number of FFN channels in their configurations."""


@dataclass(frozen=True)
class Cut:
    """The content of fedspine.json."""

    format: str
    family: str
    task: str
    base_model: str
    layers: tuple[tuple[int, int], ...]
    """As `Counts`."""


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    settings: PretrainedConfig,
    task: str,
    counts: Counts,
    base_model: str,
    generation: GenerationConfig | None = None,
) -> bool:
    """Write model.safetensors, config.json and what else a model's folder needs; whether transformers can read it.

    `weights`: of the cut model, by the names that the uncut one gives them. `settings`: of the uncut model.
    `generation`: the base's, of a language model. `folder` is made.
    """
    settings.dtype = torch.float32
    model, stock = _hollow(settings, task, counts)
    _fill(model, weights, folder)
    if generation is not None:
        model.generation_config = generation
    quiet()
    model.save_pretrained(folder, save_original_format=False, max_shard_size="1000GB")
    if not stock:
        cut = Cut(FORMAT, settings.model_type, task, base_model, tuple(counts))
        write_atomically(folder / FILE, (json.dumps(asdict(cut), indent=2) + "\n").encode())
    return stock


def save_adapter(
    folder: Path, arrays: Arrays, weights: Mapping[str, torch.Tensor], shape: ModelShape, scale: float, task: str
) -> None:
    """Write adapters (narrow) as a PEFT adapter, with the trained head beside them: PEFT wants a classifier's.

    `weights`: of the model that they belong to, by their names in it. `folder` is made.
    """
    prefix = "base_model.model."
    head = [path for path in family_of(shape.family).head if any(name.startswith(f"{path}.") for name in weights)]
    tensors = {prefix + name: weights[name] for name in weights if name.startswith(tuple(f"{path}." for path in head))}
    for module in shape.modules:
        for side in "AB":
            tensors[f"{prefix}{module.name}.lora_{side}.weight"] = torch.from_numpy(arrays[f"{module.name}.{side}"])
    rank = len(arrays[f"{shape.modules[0].name}.A"])
    alpha = scale * rank
    settings = LoraConfig(
        task_type=_TASKS[task][1],
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=[module.name for module in shape.modules],
        modules_to_save=head or None,
        lora_dropout=0.0,
        inference_mode=True,
    )
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.to_dict().items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_atomically(folder / "adapter_config.json", (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def assembled(
    weights: Mapping[str, torch.Tensor], settings: PretrainedConfig, task: str, counts: Counts
) -> PreTrainedModel:
    """What `save_model` would write, as a model in eval mode."""
    model = _resized(_empty(settings, task), counts, "the model")
    _fill(model, weights, "the model")
    return model.eval()


def load_model(source: str | Path) -> PreTrainedModel:
    """The model of an exported folder, of any other model folder of transformers, or of a hub name; in eval mode.

    Its class is the one that config.json names. Weights are read from safetensors only, and no code of the folder is
    run. An adapter beside it is not loaded: `peft.PeftModel.from_pretrained(load_model(DIR), f"{DIR}/adapter")`.

    Errors: `ModelError` when it cannot be found or read, is torn, or does not fit together.
    """
    quiet()
    folder = Path(source)
    if not (folder / FILE).is_file():
        return _load_stock(str(source))
    cut = _read(folder / FILE)
    settings = _settings(str(folder))
    if settings.model_type != cut.family:
        raise ModelError(
            f"{folder / FILE} is of family '{cut.family}', and config.json beside it of '{settings.model_type}': they "
            "do not belong together; export the run again"
        )
    model = _resized(_empty(settings, cut.task), cut.layers, folder / FILE)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read: {error}; export the run again") from None
    _fill(model, weights, folder)
    return model.eval()


def cut_of(source: str | Path) -> Cut | None:
    """What every layer keeps, of a folder that only FedSpine can read; None of any other.

    Errors: `ModelError` when fedspine.json cannot be read.
    """
    path = Path(source) / FILE
    return _read(path) if path.is_file() else None


def _load_stock(source: str) -> PreTrainedModel:
    settings = _settings(source)
    architecture = next(iter(settings.architectures or ()), None)
    kind: Any = getattr(transformers, architecture, None) if architecture else None
    if not _is_model(kind):
        raise ModelError(
            f"'{source}' cannot be loaded: config.json names the architecture {architecture!r}, which transformers "
            f"{transformers.__version__} does not have; a newer one may"
        )
    try:
        model, info = kind.from_pretrained(model_source(source), use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _not_loadable(source, error) from None
    if absent := sorted(map(str, info["missing_keys"])):
        raise ModelError(f"'{source}' cannot be loaded: its weights hold no '{absent[0]}', which {architecture} needs")
    return model.eval()


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)


def _settings(source: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(model_source(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise _not_loadable(source, error) from None


def _not_loadable(source: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    return ModelError(
        f"'{source}' cannot be loaded: {reason} Give a folder that `fedspine export` wrote, another model folder with "
        "config.json and safetensors weights, or a hub name (needs a connection)"
    )


def _read(path: Path) -> Cut:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; export the run again") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ModelError(f"{path} is of format {found!r}; this version of FedSpine reads '{FORMAT}'")
    try:
        layers = tuple((int(heads), int(channels)) for heads, channels in values["layers"])
        cut = Cut(FORMAT, str(values["family"]), str(values["task"]), str(values["base_model"]), layers)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is incomplete: {type(error).__name__}: {error}; export the run again") from None
    if cut.task not in _TASKS:
        raise ModelError(f"{path}: task '{cut.task}' must be one of {', '.join(_TASKS)}")
    family_of(cut.family)
    return cut


def _hollow(settings: PretrainedConfig, task: str, counts: Counts) -> tuple[Any, bool]:
    """A cut model without weights, and whether it is one that transformers builds from a configuration alone."""
    uncut = _empty(settings, task)
    reduced = _reduced(settings, projections(uncut, settings.model_type), counts)
    cut = _resized(uncut, counts, "the structure")
    if reduced is not None:
        try:
            model = _empty(type(settings).from_dict(reduced), task)
        except (ValueError, StrictDataclassError):  # the family wants a number of heads that divides the hidden size
            return cut, False
        if _sizes(model) == _sizes(cut):
            return model, True
    return cut, False


def _reduced(settings: PretrainedConfig, modules: list[ModuleShape], counts: Counts) -> dict[str, Any] | None:
    """The configuration's values with what is left of heads and channels, the same in every layer; otherwise None."""
    if len(set(counts)) > 1:
        return None
    heads, channels = counts[0]
    output = next(module for module in modules if module.role == "o")
    uncut = output.d_in // output.unit_size
    queries = settings.num_attention_heads // uncut
    values: dict[str, Any] = settings.to_dict()
    values |= {name: channels for name in _CHANNELS if name in values}
    if heads < uncut:
        values |= {"num_attention_heads": heads * queries, "head_dim": output.unit_size // queries}
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = heads
    return values


def _empty(settings: PretrainedConfig, task: str) -> Any:
    """The model of a configuration, its weights without storage."""
    with init_empty_weights(include_buffers=False):
        model: Any = _TASKS[task][0].from_config(settings)
    model.tie_weights()
    return model


def _resized(model: Any, counts: Counts, where: object) -> Any:
    """The same uncut model with room for what is left in every layer. `where` the counts come from, for errors."""
    family = model.config.model_type
    modules = projections(model, family)
    if len(counts) != modules[-1].layer + 1:
        raise ModelError(f"{where} has {len(counts)} layers, the model {modules[-1].layer + 1}; export the run again")
    counters = head_counters(model, family)
    for module in modules:
        linear: Any = model.get_submodule(module.name)
        rows = module.axis == "rows"
        uncut = (module.d_out if rows else module.d_in) // module.unit_size
        units = counts[module.layer][0 if module.unit == "heads" else 1]
        if not 1 <= units <= uncut:
            raise ModelError(f"{where}: layer {module.layer} keeps {units} {module.unit} of {uncut}; export again")
        kept = units * module.unit_size
        linear.out_features, linear.in_features = (kept, module.d_in) if rows else (module.d_out, kept)
        linear.weight = _room(linear.out_features, linear.in_features)
        if rows and linear.bias is not None:
            linear.bias = _room(kept)
        if module.role == "o":
            for owner, attribute, count in counters[module.layer]:
                setattr(owner, attribute, count * units // uncut)
    return model


def _room(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(sizes, device="meta"))


def _sizes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _fill(model: Any, weights: Mapping[str, torch.Tensor], where: object) -> None:
    """Give an empty model its weights, all of them and no others; tied ones need be there once."""
    layers = family_of(model.config.model_type).layers + "."
    sizes = _sizes(model)
    for name, tensor in weights.items():
        if name not in sizes:
            raise ModelError(f"{where}: the weights have '{name}', which {type(model).__name__} has no place for")
        if tensor.shape != sizes[name]:
            place = f"layer {name.removeprefix(layers).partition('.')[0]}: " if name.startswith(layers) else ""
            raise ModelError(
                f"{where}: {place}'{name}' is {list(tensor.shape)} in the weights and {list(sizes[name])} by "
                f"{FILE} and config.json: they do not belong together; export the run again"
            )
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    absent = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if absent:
        raise ModelError(f"{where}: the weights hold no '{absent[0]}', which {type(model).__name__} needs")
