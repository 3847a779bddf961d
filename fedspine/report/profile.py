"""Where the wall time of a run went, from its records. Virtual time has no part in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fedspine.types import RoundRecord

CLIENT_PARTS = ("mount", "data", "forward", "backward", "score", "optimiser", "cut", "probe batch")
SERVER_PARTS = ("plan", "aggregate", "evaluate")


def profile(records: Sequence[RoundRecord], workers: int) -> dict[str, float]:
    """Seconds of worker time by part; their sum is `workers` times the wall time of the rounds.

    Parts of the local round come first. `wire and engine` is what the exchange took beside the local rounds when all
    workers were busy or waiting for each other; while the server works, its workers wait, and that is counted under
    the server's part.
    """
    server = _sums([record.wall for record in records])
    clients = _sums([pull.report.wall for record in records for pull in record.pulls])
    local = clients["seconds"]
    parts = {name: clients[name] for name in CLIENT_PARTS if clients[name]}
    parts["other local work"] = local - sum(parts.values())
    parts["wire and engine"] = workers * server["exchange"] - local
    for name in SERVER_PARTS:
        parts[name] = workers * server[name]
    parts["other server work"] = workers * (
        server["seconds"] - server["exchange"] - sum(server[name] for name in SERVER_PARTS)
    )
    return parts


def shares(parts: Mapping[str, float]) -> dict[str, float]:
    """The same as shares of the whole."""
    whole = sum(parts.values()) or 1.0
    return {name: seconds / whole for name, seconds in parts.items()}


def _sums(walls: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for wall in walls:
        for name, seconds in wall.items():
            total[name] += seconds
    return total
