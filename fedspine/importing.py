"""Imports of torch, transformers, PEFT and what stands on them, when they are needed and not before."""

from __future__ import annotations

import gc
from importlib import import_module
from types import ModuleType


def load(module: str) -> ModuleType:
    """`import_module`, in four fifths of the time.

    These packages create a million objects that stay, and the garbage collector would look through them again and
    again on the way. It rests until they are there.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        if running:
            gc.enable()
