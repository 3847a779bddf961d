"""A run against the bare training loop that executes the same local steps on models of the same size.

    .venv/bin/python benchmarks/local.py [-s key=value]... [--rounds 6] [--out FILE.json]

After every round of a run (inline, one device after the other) the bare loop does that round's local steps again: a
plain transformers model cut to the same numbers of heads and channels, stock PEFT, the same batches, AdamW and
clipping, float32; only its forward, backward and optimiser steps are timed. A run does more: probe batches, importance,
cutting, messages, aggregation, planning, evaluation. The bar for the whole is 1.10 in float32.

Modes are run in turn, each against its own bare loops: float32, bfloat16, and the devices grouped in one batch.
Also: the local step at 50 % sparsity against the dense one, in alternation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedspine.config import RunConfig, load_config, parse_override
from fedspine.lora.adapters import kept_features
from fedspine.model import load_base
from fedspine.pruning.families import family_of, head_counters, projections
from fedspine.pruning.select import select
from fedspine.report.observer import Silent
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.training import tensors
from fedspine.types import Action, RoundRecord
from fedspine.workbench import Workbench, workbench

MODES = {
    "float32": ("inline", "float32"),
    "bfloat16": ("inline", "bfloat16"),
    "grouped float32": ("grouped", "float32"),
    "grouped bfloat16": ("grouped", "bfloat16"),
}


class BareLoop(Silent):
    """Repeats the local steps of every finished round."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._bench = workbench(config.to_json())
        self._model, self._family = load_base(config, len(self._bench.data.classes))
        self.seconds: list[float] = []
        self.run_seconds: list[float] = []
        self.parts: dict[str, float] = {}

    def round_done(self, record: RoundRecord) -> None:
        total = 0.0
        for pull in record.pulls:
            model = cut_model(self._model, self._family, self._structure(pull.ratio_after))
            total += bare_seconds(model, self._bench, record.round, pull.device, pull.action)
        self.seconds.append(total)
        self.run_seconds.append(record.wall["seconds"])
        for part, seconds in record.wall.items():
            self.parts[part] = self.parts.get(part, 0.0) + seconds

    def _structure(self, ratio: float) -> Structure:
        """Of the size that the device had; which heads and channels it keeps makes no difference to the time."""
        shape = self._bench.shape
        rng = np.random.default_rng(0)
        scores = tuple(
            (rng.random(shape.heads, dtype=np.float32), rng.random(shape.channels, dtype=np.float32))
            for _ in range(shape.layers)
        )
        return select(Structure.full(shape), scores, ratio, shape)


def cut_model(model: nn.Module, family: str, structure: Structure) -> nn.Module:
    """A copy with sliced projections, as anyone would cut it."""
    model = deepcopy(model)
    for module in projections(model, family):
        kept = torch.from_numpy(kept_features(module, structure))
        linear = model.get_submodule(module.name)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(linear.weight.detach().index_select(0 if module.axis == "rows" else 1, kept))
        if linear.bias is not None and module.axis == "rows":
            linear.bias = nn.Parameter(linear.bias.detach().index_select(0, kept))
        linear.out_features, linear.in_features = linear.weight.shape
    for (heads, _), counters in zip(structure.counts(), head_counters(model, family), strict=True):
        for owner, attribute, count in counters:
            setattr(owner, attribute, count * heads // structure.heads)
    return model


def bare_seconds(model: nn.Module, bench: Workbench, round: int, device: int, action: Action) -> float:
    """Of forward, backward, clipping and AdamW on the device's batches of that round."""
    config = bench.config
    names = [module.name for module in bench.shape.modules]
    rank = action.lora_rank
    head = list(family_of(bench.shape.family).head)
    adapted: Any = get_peft_model(
        model,  # type: ignore[arg-type]
        LoraConfig(r=rank, lora_alpha=rank * config.lora_scale, target_modules=names, modules_to_save=head),
    )
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    batches = [
        (tensors(batch, torch.device("cpu")), torch.from_numpy(batch.labels))
        for batch in bench.training_batches(device, round, action.steps(config.local_iterations))
    ]
    began = time.perf_counter()
    for inputs, labels in batches:
        loss = nn.functional.cross_entropy(adapted(**inputs).logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def sparse_ratio(config: RunConfig, repeats: int = 9) -> float:
    """Dense local round over the same on a model with half of the prunable parameters, in alternation; the median."""
    from fedspine.client_round import train
    from fedspine.lora.adapters import narrow, start_adapters
    from fedspine.types import TrainRequest

    bench = workbench(config.to_json())
    shape = bench.shape
    arrays = start_adapters(shape, config.max_rank, np.random.default_rng(0)) | bench.resident.head_arrays()
    half = BareLoop(config)._structure(0.5)
    ratios = []
    for repeat in range(repeats):
        seconds = []
        for structure in (Structure.full(shape), half):
            action = Action(structure.sparsity(shape), config.fixed_rank)
            sent = narrow(arrays, structure, config.fixed_rank, shape)
            reply = train(TrainRequest(repeat + 1, repeat, action, structure, sent, None, config.to_json()))
            wall = reply.report.wall
            seconds.append(sum(wall[part] for part in ("forward", "backward", "optimiser", "score")))
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-s", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    overrides = dict(parse_override(text) for text in options.s)
    figures: dict[str, Any] = {}
    for mode in options.modes:
        engine, dtype = MODES[mode]
        config = load_config(None, {"rounds": options.rounds, **overrides, "dtype": dtype})
        loop = BareLoop(config)
        with tempfile.TemporaryDirectory() as directory:
            simulate(config, out=Path(directory) / "run", engine=engine, observer=loop)
        run, bare = sum(loop.run_seconds), sum(loop.seconds)
        evaluate = loop.parts.get("evaluate", 0.0)
        figures[mode] = {
            "ratio": run / bare,
            "ratio_without_evaluation": (run - evaluate) / bare,
            "ratio_by_round": [mine / other for mine, other in zip(loop.run_seconds, loop.seconds, strict=True)],
            "run_seconds": run,
            "bare_seconds": bare,
        }
        rounds = statistics.quantiles(figures[mode]["ratio_by_round"], n=4) if options.rounds > 1 else []
        print(
            f"{mode:18s} {run / bare:5.2f} x the bare float32 loop ({(run - evaluate) / bare:.2f} without evaluation"
            + (f"; rounds: quartiles {', '.join(f'{ratio:.2f}' for ratio in rounds)})" if rounds else ")"),
            flush=True,
        )
    sparse = sparse_ratio(load_config(None, {**overrides, "dtype": "float32"}))
    figures["dense over 50 % sparsity"] = sparse
    print(f"local step, dense over 50 % sparsity: {sparse:.2f}")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
