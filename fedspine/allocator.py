"""glibc's allocator in a process that trains again and again."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
KEPT_BYTES = 2**30
LARGEST_FROM_HEAP = 2**25
"""The most that glibc accepts."""


@cache
def keep_freed_memory() -> None:
    """Keep up to 1 GB that is freed, instead of asking the system for the same pages in every step. Linux with glibc.

    The pages of a step's activations, given back and mapped and cleared again, cost up to a fifth of the step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
