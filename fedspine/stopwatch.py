"""Where the seconds go: wall time by named part, so that a run can say what it spent its time on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Adds up wall seconds by part. Parts must not be nested: each second is counted once."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._parts: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - started

    def drawing(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, the time to make each one counted."""
        source = iter(items)
        while True:
            with self.part(name):
                item = next(source, None)
            if item is None:
                return
            yield item

    def seconds(self) -> dict[str, float]:
        """By part, with `seconds` for all the time since the start."""
        return {"seconds": time.perf_counter() - self._started, **self._parts}
