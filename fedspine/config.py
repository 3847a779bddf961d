"""One frozen `RunConfig`: every key, default and bound of a run lives here.

A method is a preset: a few values of the same keys, which the user's own values override. Keys come from a TOML file,
from `-s key=value`, or from Python keyword arguments; an unknown key is an error that names the nearest right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fedspine.config_key import checked, toml_value
from fedspine.config_key import key_field as _key
from fedspine.config_rules import check_together
from fedspine.errors import ConfigError
from fedspine.methods import METHODS
from fedspine.toml_file import read_toml

_METHOD_HELP = "preset of the keys below: fedspine (measured best), fedspine-paper (faithful), or a baseline"
MOST_CALLED = 2000
"""Devices in a roll call, which takes a message to each; where there are more there is none."""
LEAST_WORK, MOST_WORK = 0.25, 2.0
"""Of `local_iterations`, that a device may be given by a deadline."""
STABLE = 2 / 3
"""Of the rounds, before the learning rates of `stable-cosine` go down."""
BEFORE = {"rate_schedule": "constant"}
"""What runs did before there was a key, where its default is something else."""


@dataclass(frozen=True)
class RunConfig:
    """A complete description of a run: equal configurations give equal results."""

    method: str = _key("fedspine", _METHOD_HELP, *METHODS)
    seed: int = _key(0, "seed of everything that is drawn", min=0, max=2**31 - 1)

    # model, task and data
    task: str = _key(
        "classification", "a class for every text, or the next token: of plain text, or of responses to instructions",
        "classification", "causal-lm",
    )  # fmt: skip
    model: str = _key("all-MiniLM-L6-v2", "the embedded encoder, a local folder, or a hub name")
    data: str = _key("embedded", "embedded, a file, a folder with train and dev/test files, or a hub name")
    text_column: str = _key("", "column with the text; empty: found by its usual names")
    text_pair_column: str = _key("", "column with the second text of a pair; empty: found, or none")
    label_column: str = _key("", "column with the label; empty: found by its usual names")
    classes: tuple[str, ...] = _key((), "labels in the order of the model's outputs; empty: those of the training rows")
    instruction_column: str = _key("", "task=causal-lm: column with the instruction; empty: found, or none")
    context_column: str = _key("", "task=causal-lm: column with what belongs to the instruction; empty: found, or none")
    response_column: str = _key(
        "", "task=causal-lm: column with the response, on which alone the loss is taken; empty: found, or plain text"
    )
    max_length: int = _key(
        32, "tokens per text; longer ones are cut, plain text of task=causal-lm into several", min=4, max=8192
    )
    eval_examples: int = _key(0, "rows of the evaluation set to use, drawn once by seed; 0: all", min=0)

    # federation
    devices: int = _key(80, "devices in the federation", min=1, max=1_000_000)
    sampled: int = _key(10, "devices that take part in a round", min=1)
    rounds: int = _key(12, "rounds", min=1, max=100_000)
    sampling: str = _key("speed", "who takes part in a round: drawn, or devices of like speed", "uniform", "speed")
    quorum: float = _key(0.5, "share of the sampled devices that must reply for a round to count", min=0.0, max=1.0)
    close_at: float = _key(1.0, "share of a round's devices whose replies close it; 1: all of them", min=0.05, max=1.0)
    max_staleness: int = _key(4, "close_at below 1: rounds after which a late reply is dropped", min=1, max=1000)
    deadline_seconds: float = _key(
        0.0, "wall time that real devices have for an answer, after which a round goes on without them; 0: no limit",
        min=0.0, max=1e6,
    )  # fmt: skip
    partition: str = _key(
        "auto", "who has which rows: auto, iid, dirichlet, shards, column:NAME (one device per value), or all"
    )
    dirichlet_alpha: float = _key(1.0, "label skew of partition=dirichlet; smaller is more skewed", min=0.01, max=1e4)
    min_classes: int = _key(2, "classes that every device must hold; 1 allows one-class devices", min=1)
    population: str = _key("jetson-80", "device catalogue, built in or a file; after commas files of traces")
    perturbation: str = _key(
        "none", "what goes wrong on the simulated devices: none, dropout:SHARE, slowdown:SHARExFACTOR, link:SCALE or "
        "memory:SCALE (in the second half of the rounds)",
    )  # fmt: skip
    cost: str = _key(
        "virtual", "what times a device: the clock of the catalogue, or in a real federation its own",
        "virtual", "measured",
    )  # fmt: skip

    # local training
    local_iterations: int = _key(20, "optimiser steps of a device in a round", min=1, max=100_000)
    local_work: str = _key(
        "deadline", "local_iterations for every device, or by a deadline from a quarter of them, for slow devices, to "
        "twice as many, where links take long",
        "equal", "deadline",
    )  # fmt: skip
    slow_layers: int = _key(
        0, "top layers whose adapters alone are trained by devices that are clearly slower than their round's median; "
        "0: of all layers", min=0, max=1000,
    )  # fmt: skip
    prune_interval: int = _key(20, "local iterations between two cuts inside a round", min=1, max=100_000)
    batch_size: int = _key(8, "examples per optimiser step", min=1, max=4096)
    learning_rate: float = _key(1e-3, "of AdamW", min=1e-8, max=1.0)
    rate_schedule: str = _key(
        "stable-cosine", "how learning rates change from round to round: not at all, or down to nothing after the last "
        "by half a cosine wave, over all rounds or over the last third", "constant", "cosine", "stable-cosine",
    )  # fmt: skip
    logit_adjustment: float = _key(
        1.0, "weight of a device's log class prior in training logits, against label skew; 0: none", min=0.0, max=10.0
    )
    clip_norm: float = _key(1.0, "gradient norm bound of a device's step", min=1e-6, max=1e6)
    proximal: float = _key(0.0, "pull of a device towards what it received, mu of FedProx; 0: none", min=0.0, max=1e3)
    probe_examples: int = _key(32, "rows of a device's fixed probe batch for loss before and after", min=1, max=4096)
    dtype: str = _key(
        "float32", "arithmetic of the frozen model here, not of the virtual devices: bfloat16 is two to three times "
        "as fast where the processor has it; adapters stay float32", "float32", "bfloat16",
    )  # fmt: skip
    torch_device: str = _key("cpu", "where the model is trained here", "cpu", "cuda")
    gradient_checkpointing: bool = _key(
        False, "compute activations again in the backward pass: about half as much time again, for much less memory"
    )
    threads: int = _key(1, "torch threads per client and for the server; part of the result's identity", min=1, max=256)

    # adapters
    lora_targets: tuple[str, ...] = _key(
        ("q", "v", "o", "up", "down"), "projections with adapters", "q", "k", "v", "o", "gate", "up", "down"
    )
    lora_scale: float = _key(2.0, "alpha / rank, the same at every rank", min=1e-3, max=1e3)
    adapter_rate: str = _key(
        "inverse-rank", "learning rate of adapters: equal at all ranks, or the usual one at fixed_rank and in inverse "
        "proportion to the rank, so that a step of AdamW moves the product B A equally far", "equal", "inverse-rank",
    )  # fmt: skip
    min_rank: int = _key(4, "smallest LoRA rank", min=1, max=1024)
    max_rank: int = _key(16, "largest LoRA rank, and the rank of the server's adapters", min=1, max=1024)
    trained_factors: str = _key(
        "both", "LoRA factors that are trained and uploaded: both, B alone with A as it started (FFA-LoRA), "
        "B in odd rounds and A in even ones (RoLoRA), or both trained and A shared, B and head kept (FedSA-LoRA)",
        "both", "b", "alternate", "local-b",
    )  # fmt: skip

    wire_dtype: str = _key("float16", "type of adapters and head while they travel", "float32", "float16")
    rank_decay: float = _key(
        1.0, "share of its rank that a device keeps when what lies beyond became smaller (HetLoRA); 1: it keeps all",
        min=0.5, max=1.0,
    )  # fmt: skip

    rank_growth: float = _key(
        1.0, "how far the adapters grow, along the sparsity's ramp, in the projections where they matter most (APT)",
        min=1.0, max=16.0,
    )  # fmt: skip

    # pruning
    target_sparsity: float = _key(
        0.5, "share of prunable parameters (heads and FFN channels) cut on every device at the end", min=0.0, max=0.95
    )
    importance: str = _key(
        "fisher", "score of heads and channels", "fisher", "lora-gradient", "magnitude", "l1", "random", "taylor"
    )
    masks: str = _key("shared", "whose score cuts a device: the server's, its own, or both", "shared", "own", "mixed")
    regrowth: bool = _key(True, "cut the whole model anew in every round: what went by early scores can return")
    layer_budget: str = _key(
        "uniform", "heads and channels that a layer keeps: as many as any other, which stock transformers can load, or "
        "those with the best score per parameter in the whole model", "uniform", "global",
    )  # fmt: skip
    schedule: str = _key("cubic", "ramp of the sparsity floor, or everything after the warm-up", "cubic", "one-shot")
    warmup_ratio: float = _key(0.1, "share of the rounds before the first cut", min=0.0, max=0.9)
    ramp_ratio: float = _key(0.25, "share of the rounds after which every device is at the target", min=0.05, max=1.0)
    max_step_ratio: float = _key(0.5, "most that a policy may prune ahead in one round", min=0.0, max=1.0)

    # aggregation and scheduling
    aggregation: str = _key(
        "product", "how unequal adapters are joined: product space, per coordinate, mean product (FlexLoRA), "
        "zero-padded, corrected means (LoRA-FAIR), zero-padded by norm (HetLoRA), or recovered (FedMP)",
        "product", "coordinate", "flex", "zero-pad", "fair", "het", "r2sp",
    )  # fmt: skip
    fold: str = _key(
        "none", "what goes into the frozen weights after a round: nothing, the average product, with new adapters for "
        "every round (FLoRA), or what the averaged factors miss of it (FedEx-LoRA)", "none", "all", "residual",
    )  # fmt: skip
    average_decay: float = _key(0.75, "weight of the past in the averaged adapters", min=0.0, max=0.999)
    policy: str = _key(
        "fedspine", "who chooses (pruning ratio, rank)",
        "fedspine", "s-ucb", "fixed", "random", "time-model", "clairvoyant", "e-ucb", "tertile",
    )  # fmt: skip
    fixed_rank: int = _key(8, "rank of policy=fixed and of a safe first choice", min=1, max=1024)
    reward: str = _key(
        "lateness", "reward of a choice: one-sided lateness, the paper's form, or FedMP's, of the loss alone",
        "lateness", "paper", "fedmp",
    )  # fmt: skip
    probe: str = _key(
        "always",
        "time a part of an iteration and a small transfer before a configuration is fixed: in a device's first round, "
        "or in all", "never", "first", "always",
    )  # fmt: skip
    roll_call: bool = _key(
        True, f"time them on all devices (at most {MOST_CALLED}) before round 1, for sampling and policy"
    )
    timed_examples: int = _key(
        2, "rows of the local iteration that a probe times: fewer cost a device less; 0: a whole batch", min=0, max=4096
    )

    # after the last round
    distill_steps: int = _key(0, "steps in which the uncut model teaches the cut one; 0: none", min=0, max=100_000)
    public_examples: int = _key(0, "training rows that no device gets, but the server, to distill with", min=0)

    # measuring
    target_accuracy: float = _key(0.0, "smoothed accuracy whose time is reported; 0: none", min=0.0, max=1.0)
    generate_examples: int = _key(
        0, "task=causal-lm with responses: evaluation rows that the final model answers, for ROUGE-L and exact match",
        min=0, max=100_000,
    )  # fmt: skip
    generate_tokens: int = _key(64, "most tokens of such an answer", min=1, max=8192)
    eval_every: int = _key(5, "rounds between evaluations of the global model, counted back from the last", min=1)
    eval_devices: int = _key(
        100, "devices, drawn by seed, whose own model is evaluated at the end; 0: all", min=0, max=1_000_000
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(RunConfig)
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, hints[field.name], getattr(self, field.name)))
        check_together(self)

    @property
    def uses_probe(self) -> bool:
        """Only choices that ask for times gain from a probe; the others are not charged for one."""
        return self.probe != "never" and self._asks_for_times

    @property
    def uses_roll_call(self) -> bool:
        """The same of a probe of all devices, which sampling can use as well."""
        wanted = self._asks_for_times or self.sampling == "speed"
        return self.roll_call and wanted and self.devices <= MOST_CALLED

    @property
    def _asks_for_times(self) -> bool:
        return (
            self.policy in ("fedspine", "time-model", "tertile")
            or self.local_work == "deadline"
            or self.slow_layers > 0
        )

    @property
    def iterations_bounds(self) -> tuple[int, int]:
        """Fewest and most local iterations of a device in a round."""
        count = self.local_iterations
        return (count, count) if self.local_work == "equal" else deadline_bounds(count)

    @property
    def probe_share(self) -> float:
        """Share of a local iteration that a probe computes."""
        return min(1.0, self.timed_examples / self.batch_size) if self.timed_examples else 1.0

    @property
    def cuts_per_round(self) -> int:
        """Cuts in a round of `local_iterations`."""
        return self.cuts_in(self.local_iterations)

    def cuts_in(self, iterations: int) -> int:
        """Cuts in a local round: before iterations 0, K, 2K, ..., so that at least the last K iterations recover.

        A device that does more than `local_iterations` is not cut more often, and needs no scores for it.
        """
        return max(1, min(iterations, self.local_iterations) // self.prune_interval)

    def learning_rate_in(self, round: int) -> float:
        """Of the head. `round`: from 1."""
        stable = {"constant": 1.0, "cosine": 0.0, "stable-cosine": STABLE}[self.rate_schedule] * self.rounds
        if round - 1 <= stable:
            return self.learning_rate
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (round - 1 - stable) / (self.rounds - stable)))

    def adapter_factor(self, rank: int) -> float:
        """Of the learning rate of adapters of this rank, beside the head's."""
        return 1.0 if self.adapter_rate == "equal" else self.fixed_rank / rank

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RunConfig:
        """From user values over the preset of their `method` over the defaults.

        Errors: `ConfigError` for an unknown key, a wrong type, or a value out of bounds.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
                raise ConfigError(f"unknown key '{key}': did you mean '{near[0]}'? `fedspine keys` lists all of them")
        method = values.get("method", "fedspine")
        if not isinstance(method, str) or method not in METHODS:
            raise ConfigError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
        return cls(**{**METHODS[method], **values})

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def to_toml(self) -> str:
        """Every key with its help, as a file that `fedspine simulate` takes back."""
        lines = ["# Complete configuration of a FedSpine run: `fedspine simulate config.toml` repeats it."]
        for field in dataclasses.fields(self):
            lines.append(f"# {field.metadata['key'].help}")
            lines.append(f"{field.name} = {toml_value(getattr(self, field.name))}")
        return "\n".join(lines) + "\n"


def deadline_bounds(iterations: int) -> tuple[int, int]:
    """Fewest and most local iterations that a deadline gives where the configuration says `iterations`."""
    return max(1, int(LEAST_WORK * iterations)), int(MOST_WORK * iterations)


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Read a TOML file (or none) and lay `overrides` over it.

    Errors: `ConfigError` when the file is absent, is no TOML, or holds wrong keys or values.
    """
    values = {} if path is None else read_toml(path, "configuration file")
    return RunConfig.from_values({**values, **overrides})


def saved_config(directory: Path) -> RunConfig:
    """The complete configuration in a run's directory; keys that it was too early for are as they were before them.

    Errors: as `load_config`.
    """
    return RunConfig.from_values(BEFORE | read_toml(directory / "config.toml", "configuration file"))


def configured(config: RunConfig | str | Path | None, keys: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig`, a TOML file, or nothing for the defaults, with single values overridden by `keys`."""
    if isinstance(config, RunConfig):
        if not keys:
            return config
        return RunConfig.from_values({**dataclasses.asdict(config), **keys})
    return load_config(Path(config) if config is not None else None, keys)


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` of the command line: the value is TOML, and plain words may go unquoted."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"-s {text!r}: write it as key=value, for example -s rounds=20")
    try:
        return key.strip(), tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
