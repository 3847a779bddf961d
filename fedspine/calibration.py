"""`fedspine.calibrate`: a finished run's devices as a catalogue, a twin on which a simulation can go on.

Rates are fitted to the rounds that a device trained in (`devices/fitting.py`), whatever clock timed them. How good the
twin is follows from the same records: every round of a device is predicted from its rounds before, and held against
what it took.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from fedspine.config import RunConfig, saved_config
from fedspine.devices.catalogue import catalogue_text
from fedspine.devices.fitting import (
    HEADROOM,
    DeviceFit,
    device_type,
    fit,
    median_fit,
    memory_mb,
    spread,
    trained_pulls,
)
from fedspine.devices.profiles import DeviceType
from fedspine.errors import CheckpointError, ConfigError
from fedspine.report.records import read_records, write_atomically
from fedspine.types import Pull, RoundRecord


@dataclass(frozen=True)
class Prediction:
    """A device's round, predicted from its rounds before."""

    round: int
    device: int
    predicted_seconds: float
    measured_seconds: float

    @property
    def error(self) -> float:
        """Share of the measured time."""
        return abs(self.predicted_seconds / self.measured_seconds - 1)


@dataclass(frozen=True)
class Calibration:
    """What a run says of its devices."""

    run: Path
    config: RunConfig
    types: tuple[DeviceType, ...]
    """In the order of the devices' numbers: one for each, and one for a row of devices that never trained."""
    notes: tuple[str, ...]
    """How much is known of each type."""
    fits: dict[int, DeviceFit]
    """By device that trained."""
    predictions: tuple[Prediction, ...]

    @property
    def median_error(self) -> float | None:
        """Of the predictions; None: no device trained twice."""
        return median(each.error for each in self.predictions) if self.predictions else None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "median_error": self.median_error,
            "devices": {kind.name: asdict(kind) for kind in self.types},
            "rounds": {device: fitted.rounds for device, fitted in self.fits.items()},
            "predictions": [asdict(each) for each in self.predictions],
        }

    def to_toml(self) -> str:
        """The catalogue."""
        lines = [
            f"Written by `fedspine calibrate`: the {self.config.devices} devices of {self.run.name}, cost = "
            f"{self.config.cost}.",
            f"Take it with -s population=FILE -s devices={self.config.devices}.",
            "memory_mb: what a device said when it ran out; of the others twice the largest peak of the run.",
        ]
        if self.median_error is not None:
            lines.append(f"Median error of a round's time, predicted from the rounds before: {self.median_error:.1%}.")
        return catalogue_text("\n".join(lines), {"shuffled": False}, self.types, self.notes)


def calibrate(run: str | Path, out: str | Path | None = None) -> Calibration:
    """Fit device profiles to a run's `rounds.jsonl`, and write them as a catalogue where `out` is given.

    Errors: `CheckpointError` when `run` is no run directory, or no device trained; `ConfigError` when `out` exists.
    """
    directory, target = Path(run), None if out is None else Path(out)
    if target and (target.exists() or not target.absolute().parent.is_dir()):
        raise ConfigError(f"--out {target}: must be a new file in a folder that exists")
    for name in ("config.toml", "rounds.jsonl"):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: it holds no {name}, so it is no directory of a run with rounds")
    config = saved_config(directory)
    result = calibrated(directory, config, read_records(directory / "rounds.jsonl"))
    if target:
        write_atomically(target, result.to_toml().encode())
    return result


def calibrated(run: Path, config: RunConfig, records: Sequence[RoundRecord]) -> Calibration:
    """Errors: `CheckpointError` when no device trained."""
    pulls = [pull for record in records for pull in record.pulls]
    trained = _by_device(trained_pulls(pulls))
    if not trained:
        first = next((f": {pull.report.outcome}: {pull.report.message}" for pull in pulls), "")
        raise CheckpointError(f"{run}: {len(records)} finished rounds, and no device trained in any of them{first}")
    fits = {device: fit(own, config.local_iterations) for device, own in sorted(trained.items())}
    largest = max(pull.report.peak_memory_bytes for own in trained.values() for pull in own)
    noise = (
        spread([value for each in fits.values() for value in each.compute_residuals]),
        spread([value for each in fits.values() for value in each.link_residuals]),
    )
    usual, asked = median_fit(list(fits.values())), _by_device(pulls)
    types: list[DeviceType] = []
    notes: list[str] = []
    for device in range(config.devices):
        memory = memory_mb(asked.get(device, [])) or HEADROOM * largest / 1e6
        fitted = fits.get(device, usual)
        kind = device_type(f"device {device}", 1, fitted, memory, *noise)
        note = f"rounds: {fitted.rounds}" if fitted.rounds else "never trained: medians of the others"
        if not fitted.rounds and types and replace(types[-1], name=kind.name, count=1) == kind and notes[-1] == note:
            types[-1] = replace(types[-1], count=types[-1].count + 1)
            continue
        types.append(kind)
        notes.append(note)
    predictions = tuple(_one_step_ahead(trained, config.local_iterations))
    return Calibration(run, config, tuple(types), tuple(notes), fits, predictions)


def _one_step_ahead(trained: Mapping[int, Sequence[Pull]], local_iterations: int) -> Iterator[Prediction]:
    for device, pulls in trained.items():
        for count, pull in enumerate(pulls[1:], start=1):
            before = fit(pulls[:count], local_iterations)
            predicted = before.seconds(pull, pull.action.steps(local_iterations))
            yield Prediction(pull.round, device, predicted, pull.report.seconds)


def _by_device(pulls: Sequence[Pull]) -> dict[int, list[Pull]]:
    """In the order of the rounds."""
    found: dict[int, list[Pull]] = {}
    for pull in pulls:
        found.setdefault(pull.device, []).append(pull)
    return found
