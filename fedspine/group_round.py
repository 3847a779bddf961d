"""The client round of several devices at once: the requests and replies of `client_round.train`, in shared batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedspine.allocator import keep_freed_memory
from fedspine.client_round import Local, begin, next_structure, probe_batch
from fedspine.config import RunConfig
from fedspine.data.encode import Batch
from fedspine.errors import ConfigError
from fedspine.logit_adjustment import logit_shift
from fedspine.lora.adapters import HEAD
from fedspine.lora.factors import trained_sides
from fedspine.lora.group import DeviceGroup, partly
from fedspine.lora.resident import ResidentModel
from fedspine.pruning.importance import FisherScorer, mask_scores
from fedspine.stopwatch import Stopwatch
from fedspine.training import tensors
from fedspine.types import Scores, TrainReply, TrainRequest
from fedspine.workbench import Workbench, configure_threads, workbench

_LACKS = (
    ("proximal", 0, "no terms beside the loss"),
    ("rank_decay", 1, "no terms beside the loss"),
    ("rank_growth", 1, "one rank for all projections of a device"),
)
"""(key, value without it, what a shared batch has instead)."""


def groupable(config: RunConfig) -> bool:
    """Whether devices can share a batch: of a classifier, without penalties, and the importance measured on it."""
    if config.task != "classification" or any(getattr(config, key) != none for key, none, _ in _LACKS):
        return False
    return config.importance == "fisher" or config.target_sparsity == 0


def check_groupable(config: RunConfig) -> None:
    """Errors: `ConfigError` for a task, a penalty or an importance that a shared batch does not have."""
    if config.task != "classification":
        raise ConfigError(f"task = '{config.task}': engine = 'grouped' trains classifiers; use engine inline or ray")
    for key, none, what in _LACKS:
        if getattr(config, key) != none:
            raise ConfigError(
                f"{key} = {getattr(config, key)}: engine = 'grouped' has {what}; use engine inline "
                f"or ray, or {key} = {none}"
            )
    if not groupable(config):
        raise ConfigError(
            f"importance = '{config.importance}': engine = 'grouped' measures only 'fisher'; use engine inline or ray"
        )


def train_group(requests: Sequence[TrainRequest]) -> list[TrainReply]:
    """The local rounds of several devices of one run, side by side; replies in the order of the requests."""
    bench = workbench(requests[0].settings)
    configure_threads(bench.config.threads)
    keep_freed_memory()
    watch = Stopwatch()
    begun = [begin(request, bench) for request in requests]
    members = [each for each in begun if isinstance(each, Local)]
    tuned = iter(_tuned(members, bench, watch) if members else ())
    return [next(tuned) if isinstance(each, Local) else each for each in begun]


def _tuned(members: Sequence[Local], bench: Workbench, watch: Stopwatch) -> list[TrainReply]:
    config, resident = bench.config, bench.resident
    requests = [member.request for member in members]
    with watch.part("mount"):
        structures = [request.structure for request in requests]
        trained = trained_sides(config.trained_factors, requests[0].round)
        lowest = [request.action.first_layer(bench.shape.layers) for request in requests]
        group = DeviceGroup(resident, structures, [request.arrays for request in requests], trained, min(lowest))
    scorer = FisherScorer(resident, len(members)) if config.target_sparsity > 0 else None
    try:
        with watch.part("probe batch"):
            probes = [probe_batch(member, bench) for member in members]
            before = _probe_losses(resident, probes, bench.pad_id)
        parameters = list(resident.parameters.values())
        heads = [parameter for name, parameter in resident.parameters.items() if name.startswith(HEAD)]
        adapters = [parameter for name, parameter in resident.parameters.items() if not name.startswith(HEAD)]
        frozen = _frozen(resident, lowest)
        rates = [config.adapter_factor(request.action.lora_rank) for request in requests]
        rate = config.learning_rate_in(requests[0].round)
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
        flops = np.zeros(len(members))
        steps = [request.action.steps(config.local_iterations) for request in requests]
        streams = [
            bench.training_batches(request.device, request.round, count)
            for request, count in zip(requests, steps, strict=True)
        ]
        classes, strength = len(bench.data.classes), config.logit_adjustment
        shifts = [logit_shift(member.data.labels, classes, strength) for member in members]
        drawn: dict[int, Batch] = {}
        for iteration in range(max(steps)):
            working = [k for k, count in enumerate(steps) if iteration < count]
            goes_on = [float(iteration < count) for count in steps]
            with watch.part("cut"):
                if scorer is not None:
                    _cut(group, scorer, requests, bench, iteration)
                for k in working:
                    rank = requests[k].action.lora_rank
                    flops[k] += bench.workload.iteration_flops(group.structures[k].counts(), rank, lowest[k])
            with watch.part("data"):
                drawn |= {k: next(streams[k]) for k in working}
                batch, weights = side_by_side([drawn[k] for k in range(len(members))], bench.pad_id)
            with watch.part("forward"):
                losses = _losses(resident, batch, shifts)
                loss = (losses * torch.from_numpy(weights).flatten().to(resident.device)).sum()
            with watch.part("backward"):
                torch.autograd.backward(loss)
                del loss, losses
                for parameter, devices in frozen:
                    if parameter.grad is not None:
                        parameter.grad[devices] = 0.0
            with watch.part("score"):
                if scorer is not None:
                    scorer.observe(working)
            with watch.part("optimiser"):
                clip_each(parameters, config.clip_norm)
                moves = [share * part for share, part in zip(goes_on, rates, strict=True)]
                with partly(adapters, moves), partly(heads, goes_on):
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        with watch.part("probe batch"):
            after = _probe_losses(resident, probes, bench.pad_id)
        arrays, scores = group.arrays(), _scores(group, scorer)
    finally:
        group.close()
        if scorer is not None:
            scorer.close()
    wall = {part: seconds / len(members) for part, seconds in watch.seconds().items()}
    return [
        member.finished(bench, group.structures[k], arrays[k], scores[k], (before[k], after[k]), float(flops[k]), wall)
        for k, member in enumerate(members)
    ]


def side_by_side(batches: Sequence[Batch], pad_id: int) -> tuple[Batch, NDArray[np.float32]]:
    """The batches of several devices as one, padded to as many rows each; and the rows' weights [devices, rows].

    The weights of a device's rows sum to 1; padding rows weigh nothing.
    """
    rows = max(len(batch.labels) for batch in batches)
    length = max(batch.input_ids.shape[1] for batch in batches)
    ids = np.full((len(batches), rows, length), pad_id, dtype=np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    mask[:, :, 0] = 1  # an empty row would have nothing to attend to
    labels = np.zeros((len(batches), rows), dtype=np.int64)
    weights = np.zeros((len(batches), rows), dtype=np.float32)
    for index, batch in enumerate(batches):
        place = (index, slice(len(batch.labels)), slice(batch.input_ids.shape[1]))
        ids[place], mask[place] = batch.input_ids, batch.attention_mask
        if batch.token_type_ids is not None:
            types[place] = batch.token_type_ids
        labels[place[:2]] = batch.labels
        weights[place[:2]] = 1.0 / len(batch.labels)
    flat = (-1, length)
    with_types = batches[0].token_type_ids is not None
    joined = Batch(ids.reshape(flat), mask.reshape(flat), types.reshape(flat) if with_types else None, labels.ravel())
    return joined, weights


def clip_each(parameters: Sequence[torch.nn.Parameter], bound: float) -> None:
    """Clip the gradient norm of every device: parameters are stacked [devices, ...]."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def _frozen(resident: ResidentModel, lowest: Sequence[int]) -> list[tuple[torch.nn.Parameter, list[int]]]:
    """Stacked adapters with the devices that do not train them; `lowest`: of every device, the layer it trains from."""
    found = []
    for module in resident.shape.modules:
        devices = [device for device, first in enumerate(lowest) if module.layer < first]
        found += [(resident.parameters[f"{module.name}.{side}"], devices) for side in "AB" if devices]
    return found


def _cut(
    group: DeviceGroup, scorer: FisherScorer, requests: Sequence[TrainRequest], bench: Workbench, iteration: int
) -> None:
    found = [
        next_structure(request, bench, iteration, now, lambda k=k, now=now: mask_scores(scorer.by_device()[k], now))  # type: ignore[misc]
        for k, (request, now) in enumerate(zip(requests, group.structures, strict=True))
    ]
    if any(found):
        group.cut([new or now for new, now in zip(found, group.structures, strict=True)])


def _scores(group: DeviceGroup, scorer: FisherScorer | None) -> list[Scores | None]:
    if scorer is None:
        return [None] * len(group)
    return [mask_scores(*pair) for pair in zip(scorer.by_device(), group.structures, strict=True)]


def _losses(resident: ResidentModel, batch: Batch, shifts: Sequence[torch.Tensor | None] = (None,)) -> torch.Tensor:
    """Cross-entropy of every row. `shifts`: what is added to the logits of every device [classes], or None for all."""
    logits = resident.model(**tensors(batch, resident.device)).logits
    added = [shift for shift in shifts if shift is not None]
    if added:
        shift = torch.stack(added).to(resident.device)
        logits = (logits.unflatten(0, (len(shift), -1)) + shift[:, None]).flatten(0, 1)
    return functional.cross_entropy(logits, torch.from_numpy(batch.labels).to(resident.device), reduction="none")


def _probe_losses(resident: ResidentModel, probes: Sequence[Sequence[Batch]], pad_id: int) -> list[float]:
    """Mean loss of every device on its own probe batch, which comes in parts."""
    rows = np.array([sum(len(part.labels) for part in parts) for parts in probes])
    total = np.zeros(len(probes))
    with torch.inference_mode():
        for index in range(max(map(len, probes))):
            batch, weights = side_by_side([parts[min(index, len(parts) - 1)] for parts in probes], pad_id)
            losses = _losses(resident, batch).cpu().numpy().reshape(weights.shape).astype(np.float64)
            for device, parts in enumerate(probes):
                if index < len(parts):
                    total[device] += losses[device, : len(parts[index].labels)].sum()
    return [float(loss) for loss in total / rows]
