"""`fedspine.compare`: methods x seeds on the same devices, data and clock, run by run, resumable.

A seed fixes the partition, the devices' draws and every device's batches, whatever the method, and who is sampled when
for all methods of one `sampling`: differences between methods are paired. Each run is a process of its own, `fedspine
simulate`, into `DIR/runs/NAME-seedK`; a finished run is not run again, a killed one continues.

Directory: `runs/`, `comparison.json` (every figure and curve), `tables.md`, figures, and with `inference` `models/`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine import __version__
from fedspine.config import RunConfig, saved_config
from fedspine.errors import CheckpointError, ConfigError
from fedspine.inference import measure_inference
from fedspine.methods import METHODS
from fedspine.processes import Job, run_jobs
from fedspine.report.records import write_atomically
from fedspine.retime import retime_run
from fedspine.toml_file import read_toml

if TYPE_CHECKING:
    from fedspine.report.comparison_tables import View

FILE = "comparison.json"
METHODS_BY_DEFAULT = ("fedavg", "fedspine", "fedspine-paper")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    method: str
    """Its row in the tables."""
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{re.sub('[^a-z0-9.]+', '-', self.method.lower()).strip('-')}-seed{self.seed}"


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    state: str
    """`waiting`, `running`, `finished`, `failed`."""
    round: int = 0
    accuracy: float | None = None
    """Smoothed, when it was last evaluated; in the end the devices' mean."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` leaves."""

    directory: Path
    runs: tuple[dict[str, Any], ...]
    """Method, seed, summary and curve of every run."""
    view: View
    """How they are put side by side."""
    tables: str
    """Markdown."""


def compare(
    config: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    first_seed: int = 0,
    parallel: int = 1,
    out: str | Path = "comparison",
    target: float | None = None,
    baseline: str = "",
    inference: bool = False,
    retime: str | Path | None = None,
    on_progress: Callable[[Cell, Progress], None] = lambda cell, progress: None,
    **keys: Any,
) -> Comparison:
    """Run every method with seeds `first_seed`, `first_seed` + 1, ... and put them side by side.

    `config`: a TOML file of the keys that all share, with a table `[methods.NAME]` for each method of one's own: a
    preset (`method`, by default the one of that name) and its keys. A method's own keys go before those of its preset,
    and these before what all share. `keys` override what all share.
    `methods`: which, the reference first; by default all tables of the file, or else `METHODS_BY_DEFAULT`.
    `parallel`: runs at a time, one process each. `out`: continued if it holds this comparison.
    `target`: smoothed accuracy, of a model cut as far as it will be, whose time is compared; by default the highest
    that every run reached.
    `baseline`: method whose costs are 100 %; by default the reference. `inference`: in the end, export every method's
    global model of the first seed into `out`/models and measure its speed and memory against the baseline's.
    `retime`: another comparison, of the same configuration but for `population`: what it trained with policies that
    never look at times is taken from there under this population's clock, instead of training it again.

    Errors: subclasses of `FedSpineError`; before anything is written, but for a run that fails.
    """
    cells = plan(config, methods, seeds, keys, first_seed)
    if parallel < 1:
        raise ConfigError(f"parallel = {parallel}: must be at least 1")
    baseline = baseline or cells[0].method
    _check_view(cells, target, baseline, inference, retime)
    directory = Path(out)
    _check_same(directory, cells)
    runs = directory / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out {directory}: {error.strerror}; choose another directory") from None
    if retime is not None:
        for cell in cells:
            begun = any((runs / cell.name / name).exists() for name in ("summary.json", "checkpoint"))
            if not begun:
                retime_run(Path(retime) / "runs" / cell.name, cell.config, runs / cell.name)
    _run_all(cells, runs, parallel, on_progress)
    ratios = {}
    if inference:
        first = {cell.method: runs / cell.name for cell in cells if cell.seed == first_seed}
        ratios = measure_inference(first, directory / "models", baseline, cells[0].config.max_length)
    return collect(cells, directory, target, baseline, ratios)


def plan(
    config: str | Path | None, methods: Sequence[str] | None, seeds: int, keys: Mapping[str, Any], first_seed: int = 0
) -> list[Cell]:
    """The runs, seed by seed, so that an unfinished comparison has whole seeds.

    Errors: `ConfigError` for a file or key that cannot be used, an unknown method, too few seeds.
    """
    for name, value, least in (("seeds", seeds, 1), ("first_seed", first_seed, 0)):
        if value < least:
            raise ConfigError(f"{name} = {value}: must be at least {least}")
    shared, own = _read(config)
    shared |= keys
    if "seed" in shared or "method" in shared:
        word = "seed" if "seed" in shared else "method"
        raise ConfigError(f"{word}: a comparison sets it itself; use --{word}s")
    chosen = list(methods or own or METHODS_BY_DEFAULT)
    if repeated := next((name for name in chosen if chosen.count(name) > 1), None):
        raise ConfigError(f"methods: '{repeated}' is named twice")
    for name in chosen:
        if name not in own and name not in METHODS:
            raise ConfigError(
                f"methods: '{name}' is neither a preset ({', '.join(METHODS)}) nor a table [methods.\"{name}\"] of the "
                "configuration"
            )
    configs = {name: _of_method(name, shared, own.get(name, {})) for name in chosen}
    numbers = range(first_seed, first_seed + seeds)
    cells = [Cell(name, seed, replace(config, seed=seed)) for seed in numbers for name, config in configs.items()]
    names = [cell.name for cell in cells]
    if clash := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"methods: two of them would share the directory {clash}; rename one")
    return cells


def collect(
    cells: Sequence[Cell],
    directory: Path,
    target: float | None = None,
    baseline: str = "",
    inference: Mapping[str, Mapping[str, Any]] | None = None,
) -> Comparison:
    """Figures, tables and plots of the finished runs, written into `directory`. See `compare` and `View`."""
    # Only now: matplotlib and scipy take a second to import.
    from fedspine.report.comparison_figures import draw_comparison
    from fedspine.report.comparison_tables import View, as_markdown

    runs = tuple(found for cell in cells if (found := _finished(cell, directory / "runs" / cell.name)) is not None)
    if not runs:
        raise CheckpointError(f"{directory}: no run is finished yet")
    view = View(target, baseline, inference or {})
    text = as_markdown(runs, view)
    about = {"fedspine": __version__, **asdict(view), "runs": runs}
    write_atomically(directory / FILE, (json.dumps(about, indent=1) + "\n").encode())
    write_atomically(directory / "tables.md", text.encode())
    draw_comparison(runs, directory, view)
    return Comparison(directory, runs, view, text)


def _check_view(
    cells: Sequence[Cell], target: float | None, baseline: str, inference: bool, retime: str | Path | None
) -> None:
    """Errors: `ConfigError` for what cannot be compared, `CheckpointError` for a `retime` that is no comparison."""
    methods = dict.fromkeys(cell.method for cell in cells)
    if target is not None and not 0.0 < target <= 1.0:
        raise ConfigError(f"target = {target}: must be above 0 and at most 1")
    if baseline not in methods:
        raise ConfigError(f"baseline = '{baseline}': must be one of the methods, {', '.join(methods)}")
    if retime is not None and inference:
        raise ConfigError("inference: runs of another clock hold no model; measure it where they were trained")
    if retime is not None and not (Path(retime) / "runs").is_dir():
        raise CheckpointError(f"--retime {retime}: holds no comparison; name the --out of one")


def _read(config: str | Path | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(keys that all share, keys by method) of a TOML file."""
    if config is None:
        return {}, {}
    values = read_toml(Path(config), "configuration file")
    own = values.pop("methods", {})
    if not isinstance(own, dict) or not all(isinstance(keys, dict) for keys in own.values()):
        raise ConfigError(f"{config}: methods must be tables, such as [methods.fedavg]")
    return values, own


def _of_method(name: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> RunConfig:
    preset = own.get("method", name if name in METHODS else "fedspine")
    if not isinstance(preset, str) or preset not in METHODS:
        raise ConfigError(f"[methods.{name}] method = {preset!r}: must be one of {', '.join(METHODS)}")
    if "seed" in own:
        raise ConfigError(f"[methods.{name}] seed: a comparison sets it itself; use --seeds")
    try:
        return RunConfig.from_values({**shared, **METHODS[preset], **own, "method": preset})
    except ConfigError as error:
        raise ConfigError(f"method '{name}': {error}") from None


def _check_same(directory: Path, cells: Sequence[Cell]) -> None:
    """Errors: `CheckpointError` when the directory holds something else, or runs of another configuration."""
    if not directory.exists():
        return
    if not directory.is_dir() or (any(directory.iterdir()) and not (directory / "runs").is_dir()):
        raise CheckpointError(f"--out {directory}: holds something else than a comparison; choose another directory")
    for cell in cells:
        path = directory / "runs" / cell.name / "config.toml"
        if path.exists() and (found := saved_config(path.parent)) != cell.config:
            key = next(f.name for f in fields(found) if getattr(found, f.name) != getattr(cell.config, f.name))
            raise CheckpointError(
                f"--out {directory}: run {cell.name} there has {key} = {getattr(found, key)!r}, now it would be "
                f"{getattr(cell.config, key)!r}; choose another directory"
            )


def _run_all(
    cells: Sequence[Cell], directory: Path, parallel: int, on_progress: Callable[[Cell, Progress], None]
) -> None:
    """Stops at the first failure, after the runs that are under way. Errors: `FederationError` with its message."""
    todo = []
    for cell in cells:
        accuracy = _final_accuracy(directory / cell.name)
        on_progress(
            cell, Progress("waiting") if accuracy is None else Progress("finished", cell.config.rounds, accuracy)
        )
        todo += [_job(cell, directory / cell.name, on_progress)] if accuracy is None else []
    run_jobs(todo, parallel)


def _job(cell: Cell, directory: Path, on_progress: Callable[[Cell, Progress], None]) -> Job:
    """One run in a process."""

    def command() -> list[str]:
        start = [sys.executable, "-m", "fedspine", "simulate", "--engine", "auto", "--workers", "1", "--json"]
        if (directory / "config.toml").exists():
            return [*start, "--resume", str(directory)]
        directory.parent.mkdir(parents=True, exist_ok=True)
        keys = directory.with_suffix(".toml")
        write_atomically(keys, cell.config.to_toml().encode())
        return [*start, str(keys), "--out", str(directory)]

    def done(well: bool) -> None:
        if well:
            directory.with_suffix(".toml").unlink(missing_ok=True)
            on_progress(cell, Progress("finished", cell.config.rounds, _final_accuracy(directory)))
        else:
            on_progress(cell, Progress("failed"))

    return Job(
        f"run {cell.name}", command, lambda: on_progress(cell, Progress("running", *_last_round(directory))), done
    )


def _last_round(directory: Path) -> tuple[int, float | None]:
    """(last round, last smoothed accuracy) in a run's records, without reading more than is needed."""
    path = directory / "rounds.jsonl"
    if not path.exists():
        return 0, None
    lines = path.read_bytes().split(b"\n")[:-1]
    accuracies = (found for line in reversed(lines) if (found := json.loads(line)["smoothed_accuracy"]) is not None)
    return len(lines), next(accuracies, None)


def _final_accuracy(directory: Path) -> float | None:
    return float(_summary(directory)["device_accuracy_mean"]) if (directory / "summary.json").exists() else None


def _summary(directory: Path) -> dict[str, Any]:
    """Errors: `CheckpointError` when the file is damaged."""
    path = directory / "summary.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete {directory}, and the run is made again") from None
    return found


def _finished(cell: Cell, directory: Path) -> dict[str, Any] | None:
    if _final_accuracy(directory) is None:
        return None
    lines = [json.loads(line) for line in (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = "round", "clock_seconds", "floor_ratio", "accuracy", "smoothed_accuracy"
    curve = [{key: line[key] for key in keys} for line in lines if line["accuracy"] is not None]
    return {"method": cell.method, "seed": cell.seed, "summary": _summary(directory), "curve": curve}
