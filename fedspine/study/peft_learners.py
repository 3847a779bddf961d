"""Learners that PEFT brings, on a plain model: IA3, prompt tuning and prefix tuning; LoRA where weights are quantised.

IA3 (Liu et al., arXiv 2205.05638) scales keys, values and what is inside the FFN. A prompt (Lester et al., arXiv
2104.08691) is trained vectors before the text, begun as words of the vocabulary; a prefix (Li and Liang, arXiv
2101.00190) trained keys and values in every layer. The task head is trained too, as with LoRA.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from fedspine.artifact import assembled
from fedspine.config import RunConfig
from fedspine.lora.resident import Head, ResidentModel, checkpoint_layers
from fedspine.pruning.families import family_of, head_of
from fedspine.study.design import Point, compression
from fedspine.study.quantise import quantise
from fedspine.study.workload import PEFT_LEARNERS, WEIGHT_BYTES

_SCALED = ("k", "v", "qkv", "down")
"""Roles of the projections at which IA3 has its vectors: at their outputs, of the last one at its inputs."""


def is_peft(levels: Point) -> bool:
    """Whether a cell's model is PEFT's, and not the resident one."""
    return levels["learner"] in PEFT_LEARNERS or compression(levels["compression"])[0] in WEIGHT_BYTES


class PeftLearner:
    """What is mounted on a resident model, as a model of its own with what a learner trains of it."""

    def __init__(self, levels: Point, config: RunConfig, resident: ResidentModel) -> None:
        """Errors: `ModelError` without bitsandbytes, where weights are to be quantised."""
        family, (kind, _) = resident.shape.family, compression(levels["compression"])
        settings = deepcopy(resident.model.config)
        base: Any = assembled(resident.weights(), settings, config.task, resident.structure.counts())
        base.to(resident.device)
        if kind in WEIGHT_BYTES:
            quantise(base, family, kind)
        if config.gradient_checkpointing:
            checkpoint_layers(base, family)
        base.requires_grad_(False)
        self._last: torch.Tensor | None = None
        heads = head_of(base, family)
        for path in heads:
            head = Head(base.get_submodule(path))
            head.register_forward_pre_hook(lambda _, inputs: self._last_token(inputs[0]))
            base.set_submodule(path, head)
        self.device = resident.device
        learner, rank = str(levels["learner"]).removeprefix("rag+"), int(levels["rank"] or 0)
        adapter = _adapter(learner, rank, heads, config, resident)
        self.model: nn.Module = base
        if adapter is not None:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name of the past
                torch.manual_seed(config.seed)
                self.model = get_peft_model(base, adapter)
        if learner == "prompt":
            behind = partial(self._behind_prompt, rank, family_of(family).decoder)
            self.model.register_forward_pre_hook(behind, with_kwargs=True)
        self.parameters = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self._start = {name: each.detach().clone() for name, each in self.parameters.items()}

    def restart(self) -> None:
        """Back to the start, for the next user."""
        for name, parameter in self.parameters.items():
            parameter.data, parameter.grad = self._start[name].clone(), None

    def _behind_prompt(
        self, virtual: int, decoder: bool, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positions in the text are others in the model, whose own search for a row's last token needs token ids."""
        if "logits_to_keep" in keywords:
            return inputs, {**keywords, "logits_to_keep": keywords["logits_to_keep"] + virtual}
        if decoder:
            self._last = keywords["attention_mask"].sum(1) + virtual - 1
        return inputs, keywords

    def _last_token(self, states: torch.Tensor) -> tuple[torch.Tensor] | None:
        """Of every row, for the head of a decoder; the model then reads the only one there is."""
        if self._last is None:
            return None
        return (states[torch.arange(len(states), device=states.device), self._last][:, None],)


def _adapter(
    learner: str, rank: int, heads: tuple[str, ...], config: RunConfig, resident: ResidentModel
) -> PeftConfig | None:
    """PEFT's settings; None for a model that learns nothing."""
    shape = resident.shape
    common: dict[str, Any] = {"task_type": "CAUSAL_LM" if config.task == "causal-lm" else "SEQ_CLS"}
    common |= {"modules_to_save": list(heads) or None}
    if learner == "lora":
        targets = [module.name for module in shape.modules]
        alpha = config.lora_scale * rank
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, **common)
    if learner == "ia3":
        scaled = [module for module in resident.projections if module.role in _SCALED]
        inside = [module.name for module in scaled if module.role == "down"]
        return IA3Config(target_modules=[module.name for module in scaled], feedforward_modules=inside, **common)
    if learner == "prompt":
        sizes = {"token_dim": shape.hidden, "num_layers": shape.layers, "num_attention_heads": shape.heads}
        return PromptTuningConfig(num_virtual_tokens=rank, prompt_tuning_init="SAMPLE_VOCAB", **sizes, **common)
    return PrefixTuningConfig(num_virtual_tokens=rank, **common) if learner == "prefix" else None
