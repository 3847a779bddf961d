"""One model per process, its base weights resident, re-cut and re-adapted for every device that it stands in for.

PEFT puts the LoRA layers in place once. Mounting a device sets the weights of the projections to slices of the base
and the adapters to the device's own, so that the model really is smaller: its matrix products shrink. A process that
serves one device only need not keep what that device has cut: it mounts with `own`, and its memory shrinks too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fedspine.lora.adapters import HEAD, kept_features
from fedspine.lora.attention import NAME as ENCODER_ATTENTION
from fedspine.lora.factors import BOTH
from fedspine.lora.layer import ADAPTER, with_fused_lora
from fedspine.pruning.families import Family, describe, family_of, head_counters, head_of, projections
from fedspine.published import Reader
from fedspine.structure import ModelShape, ModuleShape, Structure
from fedspine.types import Array, Arrays


class ResidentModel:
    """The base model with PEFT adapters, mounted for one structure and one set of adapters at a time."""

    def __init__(
        self,
        model: nn.Module,
        family: str,
        targets: tuple[str, ...],
        rank: int,
        scale: float,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        checkpointing: bool = False,
        published: Reader | None = None,
    ) -> None:
        """Take over `model` (fresh, uncut, float32). `scale` is alpha / rank, the same for every rank mounted.

        `dtype`: of the frozen weights and of the arithmetic; adapters and head are float32 in any case. `device`:
        torch's, such as cuda. `checkpointing`: keep only the inputs of the layers for the backward pass, and compute
        what is inside them again. `published`: reads the weight of a projection from where `model` came from.
        """
        self.shape: ModelShape = describe(model, family, targets)
        self.scale = scale
        self.device = torch.device(device)
        paths = head_of(model, family)
        heads = {HEAD if len(paths) == 1 else f"{HEAD}{path}.": model.get_submodule(path) for path in paths}
        self._start = {
            prefix + name: value.detach().numpy().copy()
            for prefix, head in heads.items()
            for name, value in head.state_dict().items()
        }
        _to(model, family_of(family), dtype, self.device)
        self._heads = {prefix: Head(head.float()) for prefix, head in heads.items()}
        for path, part in zip(paths, self._heads.values(), strict=True):
            model.set_submodule(path, part)
        self.projections: list[ModuleShape] = projections(model, family)
        self._head_counters = head_counters(model, family)
        self._published = published
        self._base = {
            module.name: (linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
            for module in self.projections
            if isinstance(linear := model.get_submodule(module.name), nn.Linear)
        }
        full = Structure.full(self.shape)
        self._held = {module.name: _features(module, full) for module in self.projections}
        """Which features of a projection `_base` has: all but those that were given up."""
        settings = LoraConfig(
            r=rank, lora_alpha=scale * rank, target_modules=[m.name for m in self.shape.modules], lora_dropout=0.0
        )
        self.model = inject_adapter_in_model(with_fused_lora(settings), model, adapter_name=ADAPTER)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        _keep_first_token(model, family)
        if checkpointing:
            checkpoint_layers(model, family)
        self._modules = {module.name: module for module in self.shape.modules}
        self.structure = full
        """What is mounted."""
        self._own = False
        self._trained = BOTH
        self.first_layer = 0
        """The lowest whose adapters are trained."""
        self._folded: Arrays = {}
        self.parameters: dict[str, nn.Parameter] = {}

    def head_arrays(self) -> dict[str, Array]:
        """The task head's tensors by wire name, as they were loaded: no device's, whatever is mounted."""
        return {name: value.copy() for name, value in self._start.items()}

    def mount(
        self,
        structure: Structure,
        arrays: Arrays,
        merge: bool = False,
        own: bool = False,
        trained: str = BOTH,
        first_layer: int = 0,
    ) -> None:
        """Become the model of one device: cut to `structure`, with adapters and head from `arrays` (narrow).

        `merge`: fold the adapters into the weights, for evaluation; nothing is trainable then. `<module>.W` is folded
        in any case.
        `own`: give up what `structure` has cut, and what `cut` will: the memory is freed. It is read again when a
        later structure keeps it. Without `published` nothing is given up.
        `trained`: the factors that get gradients, A, B or AB. `first_layer`: the lowest whose adapters get any.
        Arrays with one dimension more, in front, are those of several devices: a batch is then as many equal parts.
        Every array is consumed: a wrong or missing name raises `KeyError`.
        Errors: `ModelError` when what was given up cannot be read again.
        """
        unused, self._own, self._trained, self.first_layer = set(arrays), own, trained, first_layer
        self.parameters = {}
        self._folded = {name: array for name, array in arrays.items() if name.endswith(".W")}
        for module in self.projections:
            unused.discard(f"{module.name}.W")
            self._cut_base(module, structure)
        for (heads, _), counters in zip(structure.counts(), self._head_counters, strict=True):
            for owner, attribute, count in counters:
                setattr(owner, attribute, count * heads // self.shape.heads)
        for name in self._modules:
            a, b = (self._tensor(arrays[f"{name}.{side}"]) for side in "AB")
            unused -= {f"{name}.A", f"{name}.B"}
            self._set_adapter(name, a, b, merge)
        for prefix, head in self._heads.items():
            head.stacked = {}
            for name, parameter in head.module.named_parameters():
                value = self._tensor(arrays[prefix + name])
                unused.discard(prefix + name)
                if value.ndim > parameter.ndim:
                    parameter = head.stacked[name] = nn.Parameter(value)
                parameter.data, parameter.grad = value, None
                parameter.requires_grad_(not merge)
                self.parameters[prefix + name] = parameter
        if unused:
            raise KeyError(f"adapter arrays that the model has no place for: {sorted(unused)}")
        self.structure = structure

    def cut(self, structure: Structure) -> None:
        """Cut further, in the middle of training: adapters keep their values on what stays. Gradients go."""
        narrowed = {}
        for name, array in {**self.arrays(), **self._folded}.items():
            keep = self.still_kept(name, structure)
            narrowed[name] = array if keep is None else np.take(array, keep[1], axis=keep[0])
        self.mount(structure, narrowed, own=self._own, trained=self._trained, first_layer=self.first_layer)

    def still_kept(self, name: str, structure: Structure) -> tuple[int, np.ndarray] | None:
        """(axis, positions among the current features) of an array that stay under `structure`; None: all of it."""
        module = self._modules.get(name.rpartition(".")[0])
        if module is None or not (name.endswith(".W") or name.endswith(".B") == (module.axis == "rows")):
            return None
        now = kept_features(module, self.structure)
        then = kept_features(module, structure)
        return (0 if module.axis == "rows" else 1), np.flatnonzero(np.isin(now, then))

    def arrays(self) -> dict[str, Array]:
        """Adapters and head as they are now (narrow), copied."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.parameters.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """The mounted model's tensors, not copied, by the names that they have without adapters; those are left out."""
        wrapped = re.compile(r"\.(base_layer|module)(?=\.)")  # PEFT's layers, and `Head`
        tensors = self.model.state_dict().items()
        return {wrapped.sub("", name): tensor for name, tensor in tensors if ".lora_" not in name}

    def lora(self, module: ModuleShape) -> tuple[nn.Parameter, nn.Parameter, torch.Tensor]:
        """(A [rank, d_in], B [d_out, rank], frozen weight [d_out, d_in]) of a mounted projection."""
        layer = self._layer(module.name)
        return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.get_base_layer().weight.float()

    def weight(self, projection: ModuleShape) -> torch.Tensor:
        """The frozen weight [d_out, d_in] of a mounted projection, with or without adapters, in float32."""
        return self._linear(projection.name).weight.detach().float()

    def _cut_base(self, module: ModuleShape, structure: Structure) -> None:
        weight, bias = self._base[module.name]
        held, wanted = self._held[module.name], _features(module, structure)
        if self._published and not held[wanted].all():
            weight = self._published(f"{module.name}.weight").to(weight.device, weight.dtype)
            held = np.ones_like(held)
        if not wanted[held].all():
            kept = self._tensor(np.flatnonzero(wanted[held]))
            weight = weight.index_select(0 if module.axis == "rows" else 1, kept)
        if self._own and self._published:
            self._base[module.name], self._held[module.name] = (weight, bias), wanted
        if bias is not None and module.axis == "rows" and not wanted.all():
            bias = bias.index_select(0, self._tensor(kept_features(module, structure)))
        if (folded := self._folded.get(f"{module.name}.W")) is not None:
            weight = torch.add(weight.float(), self._tensor(folded), alpha=self.scale).to(weight.dtype)
        linear = self._linear(module.name)
        linear.out_features, linear.in_features = weight.shape
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)

    def _set_adapter(self, name: str, a: torch.Tensor, b: torch.Tensor, merge: bool) -> None:
        layer = self._layer(name)
        layer.enable_adapters(not merge)
        if merge:
            linear = self._linear(name)
            merged = torch.addmm(linear.weight.float(), b, a, alpha=self.scale).to(linear.weight.dtype)
            linear.weight = nn.Parameter(merged, requires_grad=False)
        rank = a.shape[-2]
        trained = "" if merge or self._modules[name].layer < self.first_layer else self._trained
        layer.r[ADAPTER], layer.scaling[ADAPTER] = rank, self.scale
        for side, part, value in (("A", layer.lora_A[ADAPTER], a), ("B", layer.lora_B[ADAPTER], b)):
            part.weight = nn.Parameter(value, requires_grad=side in trained)
            self.parameters[f"{name}.{side}"] = part.weight

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        """A copy where the model is."""
        return torch.from_numpy(np.array(array)).to(self.device)

    def _layer(self, name: str) -> LoraLayer:
        return self.model.get_submodule(name)

    def _linear(self, name: str) -> nn.Linear:
        module = self.model.get_submodule(name)
        linear: nn.Linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
        return linear


def _features(module: ModuleShape, structure: Structure) -> NDArray[np.bool_]:
    """Those of a projection that a structure keeps, as a mask."""
    return module.features(structure.mask(module.layer, module.unit))


class Head(nn.Module):
    """A module of the task head in float32: of one device, or stacked weights of several that share a batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.stacked: dict[str, nn.Parameter] = {}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        if not self.stacked:
            return self.module(features)  # type: ignore[no-any-return]
        devices = len(next(iter(self.stacked.values())))
        parts = features.reshape(devices, -1, *features.shape[1:])
        return torch.vmap(self._with)(self.stacked, parts).flatten(0, 1)

    def _with(self, weights: Mapping[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.module, dict(weights), (features,))  # type: ignore[no-any-return]


def _keep_first_token(model: nn.Module, model_type: str) -> None:
    """The last layer computes the first token only: where the head reads no other.

    The others would cost an eighth of the arithmetic, and neither the logits nor any gradient depends on them.
    """
    family = family_of(model_type)
    if family.first_token is None:
        return
    layers = model.get_submodule(family.layers)
    attention, join = (layers[-1].get_submodule(path) for path in family.first_token)  # type: ignore[index]
    attention.forward = partial(_first_token_attention, attention)
    join.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1][:, :1]))


def _first_token_attention(
    attention: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
) -> tuple[torch.Tensor, None]:
    """What BERT's self-attention gives for the first token, [rows, 1, features]."""

    def heads(linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = linear(states)
        return features.view(*states.shape[:-1], -1, attention.attention_head_size).transpose(1, 2)

    mask = attention_mask if attention_mask is None else attention_mask[:, :, :1]
    query, key, value = (
        heads(getattr(attention, name), hidden[:, :1] if name == "query" else hidden)
        for name in ("query", "key", "value")
    )
    output = functional.scaled_dot_product_attention(query, key, value, mask, scale=attention.scaling)
    return output.transpose(1, 2).flatten(2), None


def checkpoint_layers(model: nn.Module, model_type: str) -> None:
    """Gradient checkpointing, layer by layer; without gradients it changes nothing.

    transformers' own works in training mode only, and these models stay in evaluation mode.
    """
    config: Any = model.config
    config.use_cache = False  # a cache of keys and values would be filled twice
    layers: Any = model.get_submodule(family_of(model_type).layers)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _to(model: nn.Module, family: Family, dtype: torch.dtype, device: torch.device) -> None:
    """Store and compute in `dtype`. The fused attention of CPUs is several times slower in bfloat16."""
    model.to(device, dtype)
    if device.type == "cpu" and dtype == torch.bfloat16 and isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager" if family.decoder else ENCODER_ATTENTION)
