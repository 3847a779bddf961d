"""What a round leaves in `rounds.jsonl`: a pull for every reply, the round's length, waiting and traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedspine.config import RunConfig
from fedspine.controller.reward import reward_pulls
from fedspine.cost import Workload
from fedspine.late import AwaitedReply, Closing
from fedspine.lora.adapters import ranks_of
from fedspine.types import TRAINED, Pull, RoundRecord, TrainReply

if TYPE_CHECKING:
    from fedspine.federation import RoundPlan


def awaited(workload: Workload, plan: RoundPlan, replies: Sequence[TrainReply]) -> list[AwaitedReply]:
    """The round's own replies, and when each arrives."""
    result = []
    for request, reply, before, probe in zip(plan.requests, replies, plan.ratios_before, plan.probes, strict=True):
        trained = reply.report.outcome == TRAINED
        after = reply.structure.sparsity(workload.shape) if trained else before
        rank = workload.mean_rank(ranks_of(request.arrays, workload.shape)) or request.action.lora_rank
        flops = workload.planned_flops(after, rank) * workload.flops_share(request.action)
        pull = Pull(plan.round, request.device, request.action, before, after, reply.report, flops, probe)
        result.append(AwaitedReply(pull, pull.seconds, reply))
    return result


def round_record(
    config: RunConfig,
    records: Sequence[RoundRecord],
    plan: RoundPlan,
    asked: Sequence[AwaitedReply],
    closing: Closing[AwaitedReply],
) -> RoundRecord:
    """The record of a round, not evaluated yet, with rewarded pulls.

    Downloads count in the round of the request, uploads in that of the arrival.
    """
    pulls = [each.pull for each in closing.arrived]
    past = [pull for record in records for pull in record.pulls]
    rewarded = reward_pulls(config.reward, config.target_sparsity, past, pulls)
    probes = [*plan.roll_call.values(), *(each.pull.probe for each in asked if each.pull.probe)]
    seconds = (
        plan.waited_seconds + closing.seconds + max((probe.seconds for probe in plan.roll_call.values()), default=0.0)
    )
    return RoundRecord(
        round=plan.round,
        floor_ratio=plan.floor,
        pulls=tuple(rewarded),
        round_seconds=seconds,
        clock_seconds=(records[-1].clock_seconds if records else 0.0) + seconds,
        waiting_seconds=closing.waiting_seconds,
        uploaded_bytes=sum(pull.report.upload_bytes for pull in pulls),
        downloaded_bytes=sum(each.pull.report.download_bytes for each in asked) + sum(probe.bytes for probe in probes),
        roll_call=plan.roll_call,
        away=tuple(sorted(plan.attendance.away)),
        discarded=plan.attendance.discarded,
    )
