"""How the loop tells what happens. A console, a notebook or nothing can listen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedspine.config import RunConfig
from fedspine.types import RoundRecord


@dataclass(frozen=True)
class RunPlan:
    """What will run, before it starts."""

    config: RunConfig
    device_types: tuple[str, ...]
    """By device."""
    trainable_parameters: int
    prunable_parameters: int
    total_parameters: int
    smallest_message_bytes: int
    largest_message_bytes: int
    device_memory_bytes: int
    """Estimated training memory of the uncut model at the largest rank."""
    expected_wall_seconds: float | None
    """Of all rounds on this machine; None when not calibrated."""
    engine: str
    workers: int
    directory: Path


class Observer(Protocol):
    """Called by the loop, in order, from one thread."""

    def plan(self, plan: RunPlan) -> None: ...

    def round_started(self, round: int, devices: Sequence[int]) -> None: ...

    def device_done(self, round: int, device: int, outcome: str) -> None: ...

    def round_done(self, record: RoundRecord) -> None: ...

    def evaluating(self, done: int, total: int) -> None: ...

    def warning(self, text: str) -> None: ...

    def finished(self, summary: Mapping[str, Any], directory: Path) -> None: ...


class Silent:
    """Says nothing."""

    def plan(self, plan: RunPlan) -> None: ...

    def round_started(self, round: int, devices: Sequence[int]) -> None: ...

    def device_done(self, round: int, device: int, outcome: str) -> None: ...

    def round_done(self, record: RoundRecord) -> None: ...

    def evaluating(self, done: int, total: int) -> None: ...

    def warning(self, text: str) -> None: ...

    def finished(self, summary: Mapping[str, Any], directory: Path) -> None: ...
