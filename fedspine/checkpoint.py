"""The server's state on disk: one safetensors file, replaced atomically after every round. No pickle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from safetensors.torch import safe_open

from fedspine.config import BEFORE, RunConfig
from fedspine.errors import CheckpointError
from fedspine.federation import ServerState
from fedspine.late import AwaitedReply
from fedspine.report.records import pull_of, write_atomically
from fedspine.structure import ModelShape, Structure
from fedspine.types import Array, Scores, TrainReply

FILE = "checkpoint/state.safetensors"
_FORMAT = "fedspine-state-1"


def save_state(directory: Path, config: RunConfig, state: ServerState) -> None:
    """Write `directory`/checkpoint/state.safetensors; a crash leaves the previous file whole."""
    tensors: dict[str, np.ndarray] = {}
    for prefix, arrays in (
        ("global", state.arrays),
        ("averaged", state.averaged),
        ("distilled", state.distilled or {}),
    ):
        tensors |= {f"{prefix}/{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
    for device, arrays in state.local.items():
        tensors |= {f"local/{device}/{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
    devices = sorted(state.structures)
    tensors["structure/consensus"] = _bits(state.consensus)
    if devices:
        tensors["structure/devices"] = np.stack([_bits(state.structures[device]) for device in devices])
    tensors["structure/device-index"] = np.array(devices, dtype=np.int64)
    if state.shared_scores is not None:
        tensors |= _score_tensors("scores/shared", state.shared_scores)
    for device, scores in state.own_scores.items():
        tensors |= _score_tensors(f"scores/{device}", scores)
    about = {"format": _FORMAT, "round": str(state.round), "config": config.to_json()}
    if state.pending:
        about["pending"] = json.dumps([_words(each) for each in state.pending])
        for place, each in enumerate(state.pending):
            tensors |= _reply_tensors(f"pending/{place}", each.reply)
    (directory / FILE).parent.mkdir(exist_ok=True)
    write_atomically(directory / FILE, save(tensors, about))


def load_state(directory: Path, config: RunConfig, shape: ModelShape) -> ServerState:
    """Read what `save_state` wrote.

    Errors: `CheckpointError` when there is none, it is torn, or it belongs to another configuration.
    """
    path = directory / FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: this run has no checkpoint to continue from")
    try:
        with safe_open(path, framework="np") as file:
            about: Mapping[str, str] = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if about.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a FedSpine checkpoint of format {_FORMAT}")
    try:
        later = json.loads(RunConfig().to_json()) | BEFORE  # of keys that the run was too early for
        saved = later | json.loads(about["config"])
        _check_same(path, saved, json.loads(config.to_json()))
        return _state(about, tensors, shape)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is incomplete: {type(error).__name__}: {error}") from None


def _state(about: Mapping[str, str], tensors: Mapping[str, np.ndarray], shape: ModelShape) -> ServerState:
    devices = tensors["structure/device-index"]
    return ServerState(
        round=int(about["round"]),
        arrays=_under("global/", tensors),
        averaged=_under("averaged/", tensors),
        consensus=_structure(tensors["structure/consensus"], shape),
        structures={
            int(device): _structure(bits, shape)
            for device, bits in zip(devices, tensors.get("structure/devices", ()), strict=True)
        },
        shared_scores=_scores("scores/shared", tensors, shape),
        own_scores={
            int(device): scores
            for device in devices
            if (scores := _scores(f"scores/{device}", tensors, shape)) is not None
        },
        local={int(device): own for device in devices if (own := _under(f"local/{device}/", tensors))},
        distilled=_under("distilled/", tensors) or None,
        pending=tuple(
            _awaited(words, f"pending/{place}", tensors, shape)
            for place, words in enumerate(json.loads(about.get("pending", "[]")))
        ),
    )


def _check_same(path: Path, saved: dict[str, object], wanted: dict[str, object]) -> None:
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{path} belongs to another configuration: {key} = {saved.get(key)!r} there, {wanted.get(key)!r} here; "
                "start a new run with --out, or restore the run's config.toml"
            )


def _words(awaited: AwaitedReply) -> dict[str, Any]:
    """What a late reply says besides its arrays; without wall times, which do not repeat."""
    pull = dataclasses.replace(awaited.pull, report=dataclasses.replace(awaited.pull.report, wall={}))
    return {"pull": dataclasses.asdict(pull), "seconds": awaited.seconds}


def _reply_tensors(prefix: str, reply: TrainReply) -> dict[str, np.ndarray]:
    tensors = {f"{prefix}/arrays/{name}": np.ascontiguousarray(array) for name, array in reply.arrays.items()}
    tensors[f"{prefix}/structure"] = _bits(reply.structure)
    return tensors if reply.scores is None else tensors | _score_tensors(f"{prefix}/scores", reply.scores)


def _awaited(words: dict[str, Any], prefix: str, tensors: Mapping[str, np.ndarray], shape: ModelShape) -> AwaitedReply:
    pull = pull_of(words["pull"])
    structure = _structure(tensors[f"{prefix}/structure"], shape)
    arrays, scores = _under(f"{prefix}/arrays/", tensors), _scores(f"{prefix}/scores", tensors, shape)
    return AwaitedReply(pull, words["seconds"], TrainReply(pull.device, pull.report, structure, arrays, scores))


def _under(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _bits(structure: Structure) -> np.ndarray:
    return np.frombuffer(b"".join((*structure.head_bits, *structure.channel_bits)), dtype=np.uint8)


def _structure(bits: np.ndarray, shape: ModelShape) -> Structure:
    data = bits.tobytes()
    heads, channels = (shape.heads + 7) // 8, (shape.channels + 7) // 8
    split = heads * shape.layers
    return Structure(
        heads=shape.heads,
        channels=shape.channels,
        head_bits=tuple(data[i * heads : (i + 1) * heads] for i in range(shape.layers)),
        channel_bits=tuple(data[split + i * channels : split + (i + 1) * channels] for i in range(shape.layers)),
    )


def _score_tensors(prefix: str, scores: Scores) -> dict[str, np.ndarray]:
    return {
        f"{prefix}/heads": np.stack([heads for heads, _ in scores]),
        f"{prefix}/channels": np.stack([channels for _, channels in scores]),
    }


def _scores(prefix: str, tensors: Mapping[str, np.ndarray], shape: ModelShape) -> Scores | None:
    if f"{prefix}/heads" not in tensors:
        return None
    heads, channels = tensors[f"{prefix}/heads"], tensors[f"{prefix}/channels"]
    return tuple((heads[layer], channels[layer]) for layer in range(shape.layers))
