"""`fedspine.bench`: how large and how fast a model is, alone or against another.

Two models are timed in one process in strict alternation, so that whatever else the machine does touches both. Texts
are random tokens: what they say makes no difference to the time.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from fedspine.artifact import ADAPTER
from fedspine.bench_memory import Footprint, footprint
from fedspine.bench_subject import (
    Subject,
    base_of,
    check_comparable,
    find,
    has_adapter,
    load,
    random_tokens,
    weight_bytes,
)
from fedspine.errors import ConfigError, ModelError

WARM_UP = 3
GENERATIONS = 5
"""Most repeats of a generation, which is as long as many forward passes."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many steps of it are done."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    batch: tuple[int, ...] = (1, 16)
    """Texts in a batch, each size measured by itself."""
    length: int = 64
    """Tokens of a text; of the prompt when text is generated."""
    repeats: int = 30
    """Timed runs of each model for each batch size."""
    threads: int = 1
    """Torch threads."""
    device: str = "cpu"
    dtype: str = "float32"
    new_tokens: int = 32
    """Tokens that a language model generates after every prompt."""

    def __post_init__(self) -> None:
        """Errors: `ConfigError` for a value out of bounds, `ModelError` without the GPU that is asked for."""
        numbers = [("batch", min(self.batch, default=0)), *((k, getattr(self, k)) for k in _NUMBERS)]
        for key, value in numbers:
            if value < 1:
                raise ConfigError(f"{key} = {value}: must be at least 1")
        for key, choices in (("device", ("cpu", "cuda")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, key) not in choices:
                raise ConfigError(f"{key} = '{getattr(self, key)}': must be one of {', '.join(choices)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelError("device = 'cuda': torch finds no CUDA device here; use device = 'cpu'")


_NUMBERS = ("length", "repeats", "threads", "new_tokens")


@dataclass(frozen=True)
class Latency:
    """Seconds of a forward pass over a batch."""

    batch: int
    p50: float
    p95: float
    minimum: float


@dataclass(frozen=True)
class Generation:
    """Greedy generation with a key-value cache; reading the prompts is part of the time."""

    batch: int
    tokens_per_second: float
    """New tokens of all texts of the batch together, by the median time."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one model."""

    name: str
    parameters: int
    weight_bytes: int | None
    """On disk; None for a model whose files cannot be found."""
    peak_memory_bytes: int
    """Of loading it and running the largest batch, without the libraries; on a GPU, what torch allocated there."""
    process_peak_bytes: int
    """The resident memory of that process, libraries included."""
    latency: tuple[Latency, ...]
    generation: tuple[Generation, ...]
    """Empty for models that are no language models."""


@dataclass(frozen=True)
class BenchResult:
    """The figures of a model, and of the one that it is compared with."""

    settings: Settings
    model: Figures
    against: Figures | None
    note: str
    """What else must be said: why there is no comparison, or that adapters were left out; otherwise empty."""

    def ratios(self) -> dict[str, Any]:
        """The model over the one it is compared with: below 1 is smaller and faster, for tokens per second slower."""
        if self.against is None:
            return {}
        model, against = self.model, self.against
        disk = model.weight_bytes, against.weight_bytes
        return {
            "latency": [
                {"batch": ours.batch, **{key: getattr(ours, key) / getattr(theirs, key) for key in _STATISTICS}}
                for ours, theirs in zip(model.latency, against.latency, strict=True)
            ],
            "tokens_per_second": [
                {"batch": ours.batch, "ratio": ours.tokens_per_second / theirs.tokens_per_second}
                for ours, theirs in zip(model.generation, against.generation, strict=True)
            ],
            "peak_memory": model.peak_memory_bytes / against.peak_memory_bytes if against.peak_memory_bytes else None,
            "parameters": model.parameters / against.parameters,
            "weight_bytes": disk[0] / disk[1] if disk[0] and disk[1] else None,
        }

    def to_json(self) -> dict[str, Any]:
        """Ratios, figures, settings and the machine, for `json.dumps`."""
        return {
            "ratios": self.ratios(),
            "model": dataclasses.asdict(self.model),
            "against": dataclasses.asdict(self.against) if self.against else None,
            "note": self.note,
            "settings": dataclasses.asdict(self.settings),
            "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
        }


_STATISTICS = ("p50", "p95", "minimum")


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    batch: Sequence[int] = Settings.batch,
    length: int = Settings.length,
    repeats: int = Settings.repeats,
    threads: int = Settings.threads,
    device: str = Settings.device,
    dtype: str = Settings.dtype,
    new_tokens: int = Settings.new_tokens,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a model: an exported one, a folder of transformers, the embedded model or a hub name.

    `against`: another one to compare it with; without it, an exported model is compared with the model it was cut
    from, under a head of the same kind. The other arguments are those of `Settings`.
    Errors: `ConfigError` for a setting out of bounds or two models that do different things, `ModelError` for a model
    that cannot be loaded or is too short for `length`.
    """
    settings = Settings(tuple(batch), length, repeats, threads, device, dtype, new_tokens)
    progress = progress or _nothing
    first = find(model)
    subjects, notes = [first], []
    base = base_of(model) if against is None else None
    if against is not None:
        subjects = list(check_comparable(first, find(against)))
    for subject in subjects:
        _check_length(subject, settings)
    memory = [_footprint(subject, settings, progress) for subject in subjects]
    if base:
        try:
            dense = find(base).under(first)
            memory.append(_footprint(dense, settings, progress))
            subjects.append(dense)
        except ModelError as error:
            notes.append(f"measured alone, as the model that it was cut from cannot be: {error}")
    elif base is not None:
        notes.append("measured alone: its card does not name the folder that it was cut from; name it with against")
    for subject in subjects:
        if has_adapter(subject.name):
            notes.append(f"the adapters in {subject.name}/{ADAPTER} are left out, as if they were folded in")
    with _threads(threads), torch.inference_mode():
        figures = _timed(subjects, memory, settings, progress)
    return BenchResult(settings, figures[0], figures[1] if len(figures) > 1 else None, "; ".join(notes))


def alternate(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    step: Callable[[int], None],
    warm_up: int = WARM_UP,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each call, [call][repeat], run in turn; `step` hears how many repeats are done."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(-warm_up, repeats):
        for call, own in zip(calls, seconds, strict=True):
            began = clock()
            call()
            if repeat >= 0:
                own.append(clock() - began)
        step(max(0, repeat + 1))
    return seconds


def _footprint(subject: Subject, settings: Settings, progress: Progress) -> Footprint:
    progress(f"memory of {subject.name}", 0, 1)
    result = footprint(subject, max(settings.batch), settings.length, settings.threads, settings.device, settings.dtype)
    progress(f"memory of {subject.name}", 1, 1)
    return result


def _timed(
    subjects: Sequence[Subject], memory: Sequence[Footprint], settings: Settings, progress: Progress
) -> list[Figures]:
    """Load the models and time them in turn."""
    models = []
    for done, subject in enumerate(subjects):
        progress("loading", done, len(subjects))
        models.append(load(subject, settings.device, settings.dtype))
    progress("loading", len(subjects), len(subjects))
    latency: list[list[Latency]] = [[] for _ in models]
    generation: list[list[Generation]] = [[] for _ in models]
    for batch in settings.batch:
        tokens = random_tokens(subjects, batch, settings.length, settings.device)
        rows = _in_turn(
            [_forward(model, tokens) for model in models], settings.repeats, progress, f"latency, batch {batch}"
        )
        for own, seconds in zip(latency, rows, strict=True):
            p50, p95 = np.percentile(seconds, (50, 95)).tolist()
            own.append(Latency(batch, p50, p95, min(seconds)))
        if not subjects[0].generates:
            continue
        rows = _in_turn(
            [_generation(model, tokens, settings.new_tokens) for model in models],
            min(settings.repeats, GENERATIONS),
            progress,
            f"generation, batch {batch}",
            warm_up=1,
        )
        for made, seconds in zip(generation, rows, strict=True):
            made.append(Generation(batch, batch * settings.new_tokens / float(np.median(seconds))))
    return [
        Figures(
            name=subject.name,
            parameters=model.num_parameters(),
            weight_bytes=weight_bytes(subject.name),
            peak_memory_bytes=peak.model,
            process_peak_bytes=peak.process,
            latency=tuple(own),
            generation=tuple(made),
        )
        for subject, model, peak, own, made in zip(subjects, models, memory, latency, generation, strict=True)
    ]


def _in_turn(
    calls: Sequence[Callable[[], object]], repeats: int, progress: Progress, what: str, warm_up: int = WARM_UP
) -> list[list[float]]:
    progress(what, 0, repeats)
    return alternate(calls, repeats, lambda done: progress(what, done, repeats), warm_up)


def _forward(model: PreTrainedModel, tokens: dict[str, torch.Tensor]) -> Callable[[], object]:
    def run() -> None:
        model(**tokens)
        _wait(model)

    return run


def _generation(model: PreTrainedModel, tokens: dict[str, torch.Tensor], count: int) -> Callable[[], object]:
    """Greedy, of exactly `count` tokens, whatever ends a text otherwise."""
    plan = GenerationConfig(
        do_sample=False,
        use_cache=True,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=model.config.pad_token_id,
    )

    def run() -> None:
        model.generate(**tokens, generation_config=plan)
        _wait(model)

    return run


def _wait(model: PreTrainedModel) -> None:
    """Until a GPU is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _check_length(subject: Subject, settings: Settings) -> None:
    new = settings.new_tokens if subject.generates else 0
    if subject.longest is not None and settings.length + new > subject.longest:
        beside = f" and new_tokens = {new}" if new else ""
        raise ModelError(
            f"length = {settings.length}{beside}: {subject.name} takes at most {subject.longest} tokens; use fewer"
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nothing(*_: object) -> None:
    pass
