"""Rates of devices from what their rounds took: robust lines, by device.

A local round takes iterations x fixed cost + FLOPs / rate, a transfer latency + bytes / bandwidth. Both are a line with
an intercept that is often too small to see: it is fitted (Theil and Sen: the median slope between two rounds) from six
rounds on and kept where it is at least three times its standard error; otherwise all time is given to the rate, the
median of the rounds' own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fedspine.devices.profiles import DeviceType
from fedspine.types import OUT_OF_MEMORY, TRAINED, Pull

NEWEST = 50
"""Rounds of a device that are looked at: the last ones."""
OWN_SPREAD, OWN_INTERCEPT = 4, 6
"""Rounds from which a device has a spread, and a fixed cost, of its own."""
DEVIATION = 1.4826
"""Standard deviation of normal values over the median of their distances from the median."""
HEADROOM = 2.0
"""On the largest peak of memory seen, where devices never ran out: how much more they have is not known."""
LEAST_MB = 0.25
"""What a device that says it has 0 MB is given."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """Seconds of an amount: of FLOPs, or of bytes."""

    intercept: float
    slope: float

    def seconds(self, amount: float) -> float:
        return self.intercept + self.slope * amount


@dataclass(frozen=True)
class DeviceFit:
    """What the rounds of a device say of it."""

    rounds: int
    compute: Line
    """Of an iteration, by its FLOPs."""
    download: Line
    upload: Line
    compute_residuals: tuple[float, ...]
    """Logarithm of measured over fitted, by round."""
    link_residuals: tuple[float, ...]

    def seconds(self, pull: Pull, iterations: int) -> float:
        """Predicted for a round of so many FLOPs and bytes."""
        report = pull.report
        return (
            iterations * self.compute.seconds(pull.flops / iterations)
            + self.download.seconds(report.download_bytes)
            + self.upload.seconds(report.upload_bytes)
        )


def trained_pulls(pulls: Sequence[Pull]) -> list[Pull]:
    """Those that tell of a device's speed."""
    return [
        pull
        for pull in pulls
        if pull.report.outcome == TRAINED and pull.flops > 0 and min(_sizes(pull)) > 0 and pull.report.seconds > 0
    ]


def fit(pulls: Sequence[Pull], local_iterations: int) -> DeviceFit:
    """From the trained pulls of one device, at least one."""
    pulls = pulls[-NEWEST:]
    reports = [pull.report for pull in pulls]
    steps = np.array([pull.action.steps(local_iterations) for pull in pulls], dtype=np.float64)
    flops = np.array([pull.flops for pull in pulls]) / steps
    compute = np.array([report.compute_seconds for report in reports]) / steps
    downs = np.array([(report.download_bytes, report.download_seconds) for report in reports], dtype=np.float64)
    ups = np.array([(report.upload_bytes, report.upload_seconds) for report in reports], dtype=np.float64)
    downs, ups = (each[each[:, 1] > 0] for each in (downs, ups))
    if not len(downs) or not len(ups):  # no transfer was large enough to be timed: as fast as the other direction
        downs = ups = downs if len(downs) else ups if len(ups) else np.array([[1.0, 1e-9]])
    of_compute, of_download, of_upload = line(flops, compute), line(*downs.T), line(*ups.T)
    return DeviceFit(
        len(pulls),
        of_compute,
        of_download,
        of_upload,
        _residuals(of_compute, flops, compute),
        _residuals(of_download, *downs.T) + _residuals(of_upload, *ups.T),
    )


def line(amounts: Values, seconds: Values) -> Line:
    """Through positive values."""
    proportional = Line(0.0, float(np.median(seconds / amounts)))
    first, second = np.triu_indices(len(amounts), 1)
    apart = np.abs(amounts[second] - amounts[first]) > 1e-3 * np.median(amounts)
    if len(amounts) < OWN_INTERCEPT or not apart.any():
        return proportional
    first, second = first[apart], second[apart]
    slope = float(np.median((seconds[second] - seconds[first]) / (amounts[second] - amounts[first])))
    intercept = float(np.median(seconds - slope * amounts))
    rest = seconds - intercept - slope * amounts
    variance = float(np.sum(rest**2)) / (len(amounts) - 2)  # not robust: an outlier only makes it more careful
    variance *= 1 / len(amounts) + float(np.mean(amounts)) ** 2 / float(np.sum((amounts - amounts.mean()) ** 2))
    return Line(intercept, slope) if slope > 0 and intercept > 3 * math.sqrt(variance) else proportional


def spread(residuals: Sequence[float]) -> float:
    """Standard deviation of logarithms around their median; 0 of less than two."""
    if len(residuals) < 2:
        return 0.0
    middle = median(residuals)
    return DEVIATION * median(abs(value - middle) for value in residuals)


def memory_mb(pulls: Sequence[Pull]) -> float | None:
    """What a device said it has when it ran out of memory, the least if several times; None: it never did."""
    said = [
        float(match[1])
        for pull in pulls
        if pull.report.outcome == OUT_OF_MEMORY and (match := re.search(r"MB of (\d+) MB", pull.report.message))
    ]
    return max(LEAST_MB, min(said)) if said else None


def device_type(name: str, count: int, fitted: DeviceFit, memory: float, jitter: float, sigma: float) -> DeviceType:
    """An entry of a catalogue; `jitter` and `sigma` are for devices of few rounds."""
    own = fitted.rounds >= OWN_SPREAD
    return DeviceType(
        name,
        count,
        gflops=1e-9 / fitted.compute.slope,
        modes=(1.0,),
        memory_mb=memory,
        iteration_ms=1e3 * fitted.compute.intercept,
        download_mbps=8e-6 / fitted.download.slope,
        upload_mbps=8e-6 / fitted.upload.slope,
        jitter=spread(fitted.compute_residuals) if own else jitter,
        bandwidth_sigma=spread(fitted.link_residuals) if own else sigma,
        latency_ms=1e3 * (fitted.download.intercept + fitted.upload.intercept) / 2,
    )


def median_fit(fits: Sequence[DeviceFit]) -> DeviceFit:
    """Of a device of which nothing is known."""

    def middle(lines: Sequence[Line]) -> Line:
        return Line(median(each.intercept for each in lines), median(each.slope for each in lines))

    return DeviceFit(
        0,
        middle([each.compute for each in fits]),
        middle([each.download for each in fits]),
        middle([each.upload for each in fits]),
        (),
        (),
    )


def _sizes(pull: Pull) -> tuple[float, float, float]:
    return pull.report.compute_seconds, pull.report.download_bytes, pull.report.upload_bytes


def _residuals(fitted: Line, amounts: Values, seconds: Values) -> tuple[float, ...]:
    """Scaled for what the fit took of them; none of a single round."""
    count = len(amounts)
    if count < 2:
        return ()
    found = np.log(seconds / (fitted.intercept + fitted.slope * amounts)) * math.sqrt(count / (count - 1))
    return tuple(float(value) for value in found)
