"""Recorded conditions: throughput of links, and when devices can take part.

Which trace a device follows is drawn by seed. Bandwidth is read at a time of the trace that goes on by `ROUND_SECONDS`
with every round, whatever the virtual clock says, so that it is a pure function of seed, device and round. Availability
follows the virtual clock, which starts at a time of the traces that is drawn by seed and the same for all devices: the
hours of the day stay those of the traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TRACE, _CALENDAR, _START = 107, 108, 109
"""What a draw is for; the clock's own have smaller numbers."""
ROUND_SECONDS = 60.0
"""That a trace of bandwidth goes on from round to round."""
WINDOW_SECONDS = 10.0
"""Over which it is averaged."""
UPLOAD_SHARE = 0.5
"""Of the download bandwidth, as in the built-in catalogues: traces are of downloads."""
SLOWEST_MBPS = 0.001
"""A dead spot: what a transfer would wait for is not known."""


@dataclass(frozen=True, eq=False)
class LinkTraces:
    """Throughput of downloads over time, repeated without end."""

    mbps: tuple[NDArray[np.float32], ...]
    step_seconds: tuple[float, ...]

    def read(self, seed: int, device: int, round: int) -> tuple[float, float]:
        """(download, upload) in Mbit/s."""
        draw = np.random.default_rng([seed, device, _TRACE])
        number = int(draw.integers(len(self.mbps)))
        values, step = self.mbps[number], self.step_seconds[number]
        begin = int(draw.random() * len(values)) + round * ROUND_SECONDS / step
        window = np.arange(max(1, int(WINDOW_SECONDS / step)))
        down = max(SLOWEST_MBPS, float(values.take(int(begin) + window, mode="wrap").mean()))
        return down, UPLOAD_SHARE * down


@dataclass(frozen=True, eq=False)
class Availability:
    """Intervals in which devices can take part, repeated without end."""

    begins: tuple[NDArray[np.float64], ...]
    """Seconds, ascending, by trace."""
    ends: tuple[NDArray[np.float64], ...]
    periods: tuple[float, ...]

    def calendars(self, seed: int, devices: int) -> NDArray[np.unsignedinteger[Any]]:
        """Trace of every device [devices]: a byte each, where there are at most 256."""
        smallest = np.min_scalar_type(len(self.periods) - 1)
        return np.random.default_rng([seed, _CALENDAR]).integers(len(self.periods), size=devices, dtype=smallest)

    def present(self, seed: int, clock_seconds: float) -> NDArray[np.bool_]:
        """Whether a device that follows a trace can take part [traces]."""
        now = np.random.default_rng([seed, _START]).uniform(0, max(self.periods)) + clock_seconds
        found = np.zeros(len(self.periods), dtype=np.bool_)
        for number, (begins, ends, period) in enumerate(zip(self.begins, self.ends, self.periods, strict=True)):
            last = int(np.searchsorted(begins, now % period, side="right")) - 1
            found[number] = last >= 0 and now % period < ends[last]
        return found
