"""FedSpine: federated pruning and LoRA tuning of language models on weak, unequal devices.

import fedspine
run = fedspine.simulate(devices=20, sampled=5, rounds=10)
run.summary["device_accuracy_mean"]
fedspine.schedule(devices=1_000_000, sampled=100).summary["progress_per_virtual_second"]  # the scheduler alone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedspine.config import RunConfig
from fedspine.errors import FedSpineError

if TYPE_CHECKING:
    from fedspine.comparison import Comparison, compare
    from fedspine.schedule_only import ScheduleResult, schedule
    from fedspine.simulation import RunResult, simulate

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "FedSpineError",
    "RunConfig",
    "RunResult",
    "ScheduleResult",
    "__version__",
    "compare",
    "schedule",
    "simulate",
]


def __getattr__(name: str) -> Any:
    # Only on first use: torch, transformers and Flower take seconds to import, and `fedspine --help` needs none.
    if name in ("RunResult", "simulate"):
        from fedspine import simulation

        return getattr(simulation, name)
    if name in ("Comparison", "compare"):
        from fedspine import comparison

        return getattr(comparison, name)
    if name in ("ScheduleResult", "schedule"):
        from fedspine import schedule_only

        return getattr(schedule_only, name)
    raise AttributeError(f"module 'fedspine' has no attribute {name!r}")
