"""Files of others that say what devices are like: recognised by their columns, mapped onto the catalogue's fields.

FedScale capacity, a JSON object by client: `computation` (ms a sample), `communication` (kbit/s)
    gflops = 600 / computation; both directions of the link = communication / 1000 Mbit/s; no noise; memory_mb = 2400
FedScale availability, a JSON object by client: `active`, `inactive`, `finish_time` (s)
    a device can take part from active[i] to inactive[i], repeated every finish_time
AI-Benchmark, a JSON list of phones: `Model`, `CPU_F_AI_Score`, `RAM` ("8GB")
    gflops = score / 1000; memory_mb = 600 x GB; iteration_ms = 4; link 20 Mbit/s down, 10 up, noise as usual
bandwidth, a JSON object a line: `name`, `mbps` (list), `dt_s`
    download = the trace, upload = half of it (`traces.py`)

FedScale computes 3 x computation for training on a sample, and FLOPs of training are here about three times those of a
forward pass too; so the rate is that of the forward pass, taken as MobileNetV2's 0.6 GFLOP (an assumption: the file
does not name the network). AI-Benchmark's float score on the CPU is relative: 1 GFLOP/s for 1000 (a guess) brings the
fast phones of 2019 next to the 3.2 GFLOP/s that published step times give for the phone `nova9pro`. A file that says
nothing of memory is taken as phones of 4 GB.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fedspine.devices.catalogue import parse_catalogue
from fedspine.devices.profiles import USABLE, DeviceType, Population
from fedspine.devices.traces import Availability, LinkTraces
from fedspine.errors import PopulationError

SAMPLE_GFLOP = 0.6
"""Of a forward pass of FedScale's sample."""
SCORE_OF_A_GFLOP = 1000.0
PHONE_GB = 4.0

Source: TypeAlias = Population | LinkTraces | Availability
Row: TypeAlias = tuple[str, dict[str, Any]]
"""Where it is, for messages, and its columns."""


def read_source(name: str) -> Source | None:
    """What a file holds, a catalogue or one of the above; None when there is no such file.

    Errors: `PopulationError` names the file, the entry and the column.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PopulationError(f"population = '{name}': not valid TOML: {error}") from None
    except OSError as error:
        raise PopulationError(f"population = '{name}': cannot be read: {error}") from None
    rows = _rows(name, text)
    return parse_catalogue(name, text) if rows is None else _recognised(name, rows)


def _rows(name: str, text: str) -> list[Row] | None:
    """Entries of a JSON object or list, or of JSON lines; None: no JSON."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        values = json.loads(text)
    except ValueError:
        try:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            return None
    if isinstance(values, dict) and not any(isinstance(value, dict) for value in values.values()):
        values = [values]  # a single line
    pairs: Iterable[tuple[Any, Any]] = values.items() if isinstance(values, dict) else enumerate(values)
    rows = [(f"population '{name}', entry {key!r}", value) for key, value in pairs]
    return [(where, value if isinstance(value, dict) else {}) for where, value in rows]


def _recognised(name: str, rows: list[Row]) -> Source:
    """By the columns of the first entry."""
    columns = set(rows[0][1]) if rows else set()
    found = max(_FORMATS, key=lambda kind: len(columns & set(_FORMATS[kind][0])))
    wanted, build = _FORMATS[found]
    if not columns & set(wanted):
        known = "; ".join(f"{kind} ({', '.join(keys)})" for kind, (keys, _) in _FORMATS.items())
        raise PopulationError(f"population = '{name}': JSON of no known kind; known are a TOML catalogue, {known}")
    for where, row in rows:
        for key in wanted:
            if key not in row:
                raise PopulationError(f"{where}: {key} is missing; {found} has {', '.join(wanted)}")
    return build(rows)


def _capacity(rows: list[Row]) -> Population:
    types = []
    for where, row in rows:
        mbps = _positive(where, row, "communication") / 1000
        gflops = 1000 * SAMPLE_GFLOP / _positive(where, row, "computation")
        name = where.partition("entry ")[2].strip("'")
        memory_mb = 1000 * PHONE_GB * USABLE
        types.append(DeviceType(f"client {name}", 1, gflops, (1.0,), memory_mb, 0.0, mbps, mbps))
    return Population(tuple(types), (), (), bandwidth_sigma=0.0, jitter=0.0, latency_ms=0.0, drawn=True)


def _phones(rows: list[Row]) -> Population:
    types = []
    for where, row in rows:
        gflops = _positive(where, row, "CPU_F_AI_Score") / SCORE_OF_A_GFLOP
        memory = re.fullmatch(r"([\d.]+)\s*GB", str(row["RAM"]).strip())
        if memory is None:
            raise PopulationError(f"{where}: RAM = {row['RAM']!r} must be a size such as '8GB'")
        memory_mb = 1000 * _positive(where, {"RAM": memory[1]}, "RAM") * USABLE
        types.append(DeviceType(str(row["Model"]), 1, gflops, (1.0,), memory_mb, 4.0))
    return Population(tuple(types), (20.0,), (10.0,), drawn=True)


def _traces(rows: list[Row]) -> LinkTraces:
    steps = tuple(_positive(where, row, "dt_s") for where, row in rows)
    values = tuple(_series(where, row, "mbps").astype(np.float32) for where, row in rows)
    for (where, _), trace in zip(rows, values, strict=True):
        if not len(trace) or not trace.any() or trace.min() < 0:
            raise PopulationError(f"{where}: mbps must hold numbers of at least 0, not all of them 0")
    return LinkTraces(values, steps)


def _availability(rows: list[Row]) -> Availability:
    begins = tuple(_series(where, row, "active") for where, row in rows)
    ends = tuple(_series(where, row, "inactive") for where, row in rows)
    for (where, _), begin, end in zip(rows, begins, ends, strict=True):
        if len(begin) != len(end) or (np.diff(np.stack([begin, end], axis=1).ravel()) < 0).any():
            raise PopulationError(f"{where}: active and inactive must take turns: as many of each, ascending seconds")
    return Availability(begins, ends, tuple(_positive(where, row, "finish_time") for where, row in rows))


_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[list[Row]], Source]]] = {
    "FedScale capacity": (("computation", "communication"), _capacity),
    "FedScale availability": (("active", "inactive", "finish_time"), _availability),
    "an AI-Benchmark table": (("Model", "CPU_F_AI_Score", "RAM"), _phones),
    "bandwidth traces": (("name", "mbps", "dt_s"), _traces),
}


def _positive(where: str, row: dict[str, Any], key: str) -> float:
    """Also of a text: AI-Benchmark writes its numbers so."""
    try:
        value = float(row[key])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise PopulationError(f"{where}: {key} = {row[key]!r} must be a number above 0")
    return value


def _series(where: str, row: dict[str, Any], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        values = np.array(row[key], dtype=np.float64)
    except (TypeError, ValueError):
        values = np.full(1, np.nan)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise PopulationError(f"{where}: {key} must be a list of numbers")
    return values
