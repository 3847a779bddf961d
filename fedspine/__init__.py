"""FedSpine: federated pruning and LoRA tuning of language models on weak, unequal devices.

import fedspine
run = fedspine.simulate(devices=20, sampled=5, rounds=10)
run.summary["device_accuracy_mean"]
fedspine.schedule(devices=1_000_000, sampled=100).summary["progress_per_virtual_second"]  # the scheduler alone
fedspine.export(run.directory, out="model", merge=True)
model = fedspine.load_model("model")
fedspine.bench("model").ratios()
fedspine.calibrate(run.directory, out="devices.toml").median_error
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fedspine.config import RunConfig
from fedspine.errors import FedSpineError
from fedspine.importing import load

if TYPE_CHECKING:
    from fedspine.artifact import load_model
    from fedspine.benchmark import BenchResult, bench
    from fedspine.calibration import Calibration, calibrate
    from fedspine.comparison import Comparison, compare
    from fedspine.exporting import ExportResult, export
    from fedspine.schedule_only import ScheduleResult, schedule
    from fedspine.simulation import RunResult, simulate

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is; it warns at every int8 product
__version__ = "0.1.0"
__all__ = [
    "BenchResult",
    "Calibration",
    "Comparison",
    "ExportResult",
    "FedSpineError",
    "RunConfig",
    "RunResult",
    "ScheduleResult",
    "__version__",
    "bench",
    "calibrate",
    "compare",
    "export",
    "load_model",
    "schedule",
    "simulate",
]


_MODULES = {
    **dict.fromkeys(("RunResult", "simulate"), "simulation"),
    **dict.fromkeys(("Comparison", "compare"), "comparison"),
    **dict.fromkeys(("ScheduleResult", "schedule"), "schedule_only"),
    **dict.fromkeys(("BenchResult", "bench"), "benchmark"),
    **dict.fromkeys(("ExportResult", "export"), "exporting"),
    **dict.fromkeys(("Calibration", "calibrate"), "calibration"),
    "load_model": "artifact",
}


def __getattr__(name: str) -> Any:
    # Only on first use: torch, transformers and Flower take seconds to import, and `fedspine --help` needs none.
    if name not in _MODULES:
        raise AttributeError(f"module 'fedspine' has no attribute {name!r}")
    return getattr(load(f"fedspine.{_MODULES[name]}"), name)
