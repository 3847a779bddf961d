"""A model's weights as they were published: files on this machine, out of which one tensor can be read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from fedspine.errors import ModelError
from fedspine.model import model_source

Reader = Callable[[str], torch.Tensor]
"""A tensor by its name in the model, a copy in the file's dtype."""


def weight_files(name: str) -> list[Path]:
    """The safetensors files that hold a model's weights, without adapters; none where they cannot be found."""
    folder = Path(model_source(name))
    if not folder.is_dir():
        cached = try_to_load_from_cache(str(folder), "config.json")
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():  # transformers looks in this order
        return [whole] if whole.is_file() else []
    files = [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return files if all(file.is_file() for file in files) else []


def reader_of(name: str, prefix: str, wanted: Iterable[str]) -> Reader | None:
    """Reads the `wanted` tensors of a model; None where the files do not name them as the model does.

    `prefix`: the model's `base_model_prefix`, which the files of a model without a task head leave out.
    """
    places: dict[str, tuple[Path, str]] = {}
    states = {file: _state(file) for file in weight_files(name)}
    for file in states:
        with safe_open(file, "pt") as opened:
            places |= {key: (file, key) for key in opened.keys()}  # noqa: SIM118
    found = {each: places.get(each) or places.get(each.removeprefix(f"{prefix}.")) for each in wanted}
    known = {each: place for each, place in found.items() if place}
    if len(known) < len(found):
        return None

    def read(each: str) -> torch.Tensor:
        file, key = known[each]
        try:
            if _state(file) != states[file]:
                raise OSError(f"{file} is another file than when this process loaded it; start the process again")
            with safe_open(file, "pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(key)
                return tensor.clone()  # it is a map of the file
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model = '{name}': its weights cannot be read again: {error}") from None

    return read


def _state(file: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
