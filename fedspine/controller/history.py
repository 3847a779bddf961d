"""The past of a large federation in flat arrays, and the part of it that a policy needs.

A device costs four bytes: the row of its last pull, from which its sparsity and its earlier pulls are found. A policy
is given the last `WINDOW` pulls of all devices and the last `OWN` of each one that is asked about, so that planning
costs the same in every round. (Only `sampling = speed` looks at all devices, in a few array operations.) Against the
whole past, per policy:

- fixed, random, clairvoyant look at failures only, which the own pulls hold.
- s-ucb learns from own pulls only: exact up to `OWN` of them, beyond which a pull weighs less than 0.98^200 = 2 %.
- time-model, fedspine: the rates of a device are exact (a pull's weight halves with every later one). The fleet's
  quantile, for devices never seen nor probed, is that of the devices in the window. The quality tree's oldest pull in a
  full window weighs 0.995^2000 = 0.005 %, but its leaves are split by the pulls at hand, so they may be coarser where
  nobody has been of late: nearly the same choices, not the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedspine.controller.cohort import Fleet
from fedspine.controller.time_model import log_rates
from fedspine.types import FAILED, OUT_OF_MEMORY, TRAINED, Action, Pull, Report

WINDOW = 2_000
OWN = 200
OUTCOMES = (TRAINED, OUT_OF_MEMORY, FAILED)

_SO_FAR = np.dtype([("asked", np.int32), ("log_rates", np.float64, 2)])
"""What a device's pulls up to a row tell: how many, and its rates (time_model.py)."""
_ROW = np.dtype(
    [
        ("previous", np.int32),  # row of the device's pull before, -1 for none
        ("round", np.int32),
        ("device", np.int32),
        ("rank", np.int32),
        ("outcome", np.int8),  # place in OUTCOMES
        *((name, np.float64) for name in ("ratio", "before", "after", "flops", "quality", "reward")),
        *((name, np.float64) for name in ("compute_seconds", "download_seconds", "upload_seconds")),
        *((name, np.int64) for name in ("download_bytes", "upload_bytes")),
    ]
)


class History:
    """Room for `pulls` pulls of `devices` devices; rows are memory only once they are written."""

    def __init__(self, devices: int, pulls: int) -> None:
        self._rows = np.zeros(pulls, dtype=_ROW)
        self._so_far = np.zeros(pulls, dtype=_SO_FAR)
        self._last = np.full(devices, -1, dtype=np.int32)
        self._count = 0

    @property
    def idle_bytes(self) -> int:
        """Bytes that all devices cost before any takes part."""
        return self._last.nbytes

    @property
    def devices_seen(self) -> int:
        return int(np.count_nonzero(self._last >= 0))

    def seen(self, devices: Sequence[int]) -> list[bool]:
        """Whether each device has been asked before."""
        return [bool(row >= 0) for row in self._last[devices]]

    def timed(self, devices: Sequence[int]) -> list[bool]:
        """Whether the rates of each device are known: from its first training on."""
        last = self._last[devices]
        return ((last >= 0) & ~np.isnan(self._so_far["log_rates"][last, 0])).tolist()  # type: ignore[no-any-return]

    def sparsities(self, devices: Sequence[int]) -> list[float]:
        """What each device has cut, 0..1."""
        last = self._last[devices]
        return [float(ratio) for ratio in np.where(last >= 0, self._rows["after"][last], 0.0)]

    def add(self, pulls: Sequence[Pull]) -> None:
        """A round's pulls, of different devices."""
        devices = [pull.device for pull in pulls]
        rows = slice(self._count, self._count + len(pulls))
        previous = self._last[devices].tolist()
        self._rows[rows] = [_to_row(pull, before) for pull, before in zip(pulls, previous, strict=True)]
        self._so_far[rows] = [self._after(pull, before) for pull, before in zip(pulls, previous, strict=True)]
        self._last[devices] = np.arange(rows.start, rows.stop)
        self._count = rows.stop

    def fleet(self) -> Fleet:
        """What all pulls tell of every device: the same as `Fleet.of`."""
        known = np.flatnonzero(self._last >= 0)
        last = self._last[known]
        devices = len(self._last)
        fleet = Fleet(np.zeros(devices, np.int32), np.zeros(devices), np.full((devices, 2), np.nan))
        fleet.asked[known] = self._so_far["asked"][last]
        fleet.sparsity[known] = self._rows["after"][last]
        fleet.log_rates[known] = self._so_far["log_rates"][last]
        return fleet

    def _after(self, pull: Pull, previous: int) -> tuple[int, tuple[float, float]]:
        """A device's `_SO_FAR` with one more pull; `previous`: the row of the one before."""
        if previous < 0:
            return 1, log_rates(None, pull) or (math.nan, math.nan)
        flop, byte = self._so_far["log_rates"][previous].tolist()
        past = None if math.isnan(flop) else (flop, byte)
        return int(self._so_far["asked"][previous]) + 1, log_rates(past, pull) or (math.nan, math.nan)

    def pulls(self, devices: Sequence[int]) -> list[Pull]:
        """What a policy needs to decide about `devices`, oldest first, without probes and messages."""
        begin = max(0, self._count - WINDOW)
        older: list[NDArray[np.int32]] = []
        rows = self._last[devices]
        for _ in range(OWN):
            rows = rows[rows >= 0]
            if not len(rows):
                break
            older.append(rows[rows < begin])
            rows = self._rows["previous"][rows]
        own = np.sort(np.concatenate([*older, np.empty(0, np.int32)]))
        return [_from_row(*row) for part in (self._rows[own], self._rows[begin : self._count]) for row in part.tolist()]


def _to_row(pull: Pull, previous: int) -> tuple[Any, ...]:
    report = pull.report
    return (
        previous,
        pull.round,
        pull.device,
        pull.action.lora_rank,
        OUTCOMES.index(report.outcome),
        pull.action.pruning_ratio,
        pull.ratio_before,
        pull.ratio_after,
        pull.flops,
        pull.quality,
        pull.reward,
        report.compute_seconds,
        report.download_seconds,
        report.upload_seconds,
        report.download_bytes,
        report.upload_bytes,
    )


def _from_row(
    previous: int,
    round: int,
    device: int,
    rank: int,
    outcome: int,
    ratio: float,
    before: float,
    after: float,
    flops: float,
    quality: float,
    reward: float,
    compute_seconds: float,
    download_seconds: float,
    upload_seconds: float,
    download_bytes: int,
    upload_bytes: int,
) -> Pull:
    report = Report(
        OUTCOMES[outcome],
        compute_seconds=compute_seconds,
        download_seconds=download_seconds,
        upload_seconds=upload_seconds,
        download_bytes=download_bytes,
        upload_bytes=upload_bytes,
    )
    return Pull(round, device, Action(ratio, rank), before, after, report, flops, quality=quality, reward=reward)
