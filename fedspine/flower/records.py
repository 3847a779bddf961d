"""The dataclasses of `fedspine.types` as Flower records and back, bit for bit.

Scalars and structure bits go into a `ConfigRecord`, keys are kebab-case. Tensors go into an `ArrayRecord` as one file
of safetensors: a SuperLink stores, hands out and drops every array of a message by itself, and eighty take it seconds.
Every message carries records of its own, because ranks and structures differ between devices. Flower's records know no
None: what is absent has no record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, TypeVar, cast, get_type_hints

import numpy as np
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import load, save

import fedspine
from fedspine.config import RunConfig
from fedspine.errors import ConfigError, FederationError, FedSpineError
from fedspine.structure import Structure
from fedspine.types import (
    Action,
    Array,
    EvaluateReply,
    EvaluateRequest,
    Probe,
    ProbeRequest,
    Report,
    Scores,
    TrainReply,
    TrainRequest,
)

T = TypeVar("T")
SAFETENSORS = "safetensors"
"""Name and type of the array that holds all others."""
_ERRORS: dict[str, type[FedSpineError]] = {kind.__name__: kind for kind in FedSpineError.__subclasses__()}


def pack_train_request(request: TrainRequest) -> RecordDict:
    task = _task(request)
    task["missed-rank"] = request.missed_rank
    return _joined(
        task=task,
        action=_scalars(request.action),
        structure=_structure(request.structure),
        arrays=_arrays(request.arrays),
        scores=_scores(request.scores),
    )


def unpack_train_request(records: RecordDict) -> TrainRequest:
    task = _config(records, "task")
    return TrainRequest(
        round=task["round"],
        device=task["device"],
        action=_from_scalars(Action, _config(records, "action")),
        structure=_read_structure(records),
        arrays=_read_arrays(records, "arrays"),
        scores=_read_scores(records),
        settings=_settings(task),
        missed_rank=task["missed-rank"],
    )


def pack_train_reply(reply: TrainReply) -> RecordDict:
    task = ConfigRecord({"device": reply.device, "module-salience": list(reply.report.module_salience)})
    return _joined(
        task=task,
        report=_scalars(reply.report),
        wall=ConfigRecord({name.replace(" ", "-"): seconds for name, seconds in reply.report.wall.items()}),
        structure=_structure(reply.structure),
        arrays=_arrays(reply.arrays),
        scores=_scores(reply.scores),
    )


def unpack_train_reply(records: RecordDict) -> TrainReply:
    task = _config(records, "task")
    report = replace(
        _from_scalars(Report, _config(records, "report")),
        wall=_read_wall(records),
        module_salience=tuple(float(each) for each in task["module-salience"]),
    )
    return TrainReply(
        device=task["device"],
        report=report,
        structure=_read_structure(records),
        arrays=_read_arrays(records, "arrays"),
        scores=_read_scores(records),
    )


def pack_probe_request(request: ProbeRequest) -> RecordDict:
    task = _task(request)
    task["lora-rank"] = request.lora_rank
    return _joined(task=task, structure=_structure(request.structure))


def unpack_probe_request(records: RecordDict) -> ProbeRequest:
    task = _config(records, "task")
    structure = _read_structure(records)
    return ProbeRequest(task["round"], task["device"], structure, task["lora-rank"], _settings(task))


def pack_probe(probe: Probe) -> RecordDict:
    return _joined(probe=_scalars(probe))


def unpack_probe(records: RecordDict) -> Probe:
    return _from_scalars(Probe, _config(records, "probe"))


def pack_evaluate_request(request: EvaluateRequest) -> RecordDict:
    return _joined(
        task=_task(request),
        structure=_structure(request.structure),
        arrays=_arrays(request.arrays),
    )


def unpack_evaluate_request(records: RecordDict) -> EvaluateRequest:
    task = _config(records, "task")
    arrays = _read_arrays(records, "arrays")
    return EvaluateRequest(task["round"], task["device"], _read_structure(records), arrays, _settings(task))


def pack_evaluate_reply(reply: EvaluateReply) -> RecordDict:
    return _joined(evaluation=_scalars(reply))


def unpack_evaluate_reply(records: RecordDict) -> EvaluateReply:
    return _from_scalars(EvaluateReply, _config(records, "evaluation"))


def pack_identity(device: int | str) -> RecordDict:
    """Which device of the federation a node is, by number or name."""
    return _joined(identity=ConfigRecord({"device": device}))


def unpack_identity(records: RecordDict) -> int | str:
    """Errors: `FederationError` when there is neither."""
    device = _config(records, "identity").get("device") if "identity" in records else None
    if not isinstance(device, int | str) or isinstance(device, bool):
        raise FederationError("a device answers without its name; start it with the fedspine of the server")
    return device


def pack_user_error(error: FedSpineError) -> RecordDict:
    """An error that a person caused, so that the server can raise it as it is."""
    return _joined(error=ConfigRecord({"type": type(error).__name__, "message": str(error)}))


def pack_failure(message: str) -> RecordDict:
    """Any other error of a device, as one line."""
    return _joined(failure=ConfigRecord({"message": message}))


def read_failure(records: RecordDict) -> str | None:
    """The line of `pack_failure`, or None when the records hold an answer.

    Errors: raises the `FedSpineError` that `pack_user_error` packed.
    """
    if "error" in records:
        record = _config(records, "error")
        raise _ERRORS.get(str(record.get("type")), FederationError)(str(record.get("message")))
    return str(_config(records, "failure").get("message")) if "failure" in records else None


def _task(request: TrainRequest | ProbeRequest | EvaluateRequest) -> ConfigRecord:
    return ConfigRecord(
        {
            "round": request.round,
            "device": request.device,
            "settings": request.settings,
            "version": fedspine.__version__,
        }
    )


def _settings(task: Mapping[str, Any]) -> str:
    """The run's configuration. Errors: `ConfigError` when it has other keys than this machine's code."""
    _check_keys(task["settings"], task.get("version", "of another time"))
    return cast(str, task["settings"])


@lru_cache(maxsize=8)
def _check_keys(settings: str, version: str) -> None:
    there, here = json.loads(settings).keys(), {field.name for field in fields(RunConfig)}
    if there != here:
        raise ConfigError(
            f"the server runs fedspine {version}, this device {fedspine.__version__}, and their configuration keys "
            f"differ: only the server knows {', '.join(sorted(there - here)) or 'none'}, only this device "
            f"{', '.join(sorted(here - there)) or 'none'}; install the same version on both"
        )


def _joined(**records: ArrayRecord | ConfigRecord | None) -> RecordDict:
    return RecordDict({name: record for name, record in records.items() if record is not None})


def _config(records: RecordDict, name: str) -> dict[str, Any]:
    return dict(cast(ConfigRecord, records[name]))


def _scalars(value: Any) -> ConfigRecord:
    """The int, float and str fields of a dataclass. Numpy scalars become plain ones."""
    hints = get_type_hints(type(value))
    scalars = {name: kind for name, kind in hints.items() if kind in (int, float, str)}
    plain = {name: kind(getattr(value, name)) for name, kind in scalars.items()}
    return ConfigRecord({name.replace("_", "-"): item for name, item in plain.items()})


def _from_scalars(kind: type[T], record: dict[str, Any]) -> T:
    """Errors: `TypeError`, `KeyError` when a field is absent, unknown or of another type."""
    values, hints = {name.replace("-", "_"): item for name, item in record.items()}, get_type_hints(kind)
    known = {int: (int,), float: (float, int)}  # a whole number of seconds
    if wrong := [name for name, item in values.items() if type(item) not in known.get(hints[name], (hints[name],))]:
        raise TypeError(f"{wrong[0]} = {values[wrong[0]]!r}")
    return kind(**values)


def _read_wall(records: RecordDict) -> dict[str, float]:
    return {name.replace("-", " "): float(seconds) for name, seconds in _config(records, "wall").items()}


def _structure(structure: Structure) -> ConfigRecord:
    return ConfigRecord(
        {
            "heads": structure.heads,
            "channels": structure.channels,
            "head-bits": list(structure.head_bits),
            "channel-bits": list(structure.channel_bits),
        }
    )


def _read_structure(records: RecordDict) -> Structure:
    record = _config(records, "structure")
    heads, channels = tuple(record["head-bits"]), tuple(record["channel-bits"])
    if not all(isinstance(bits, bytes) for bits in (*heads, *channels)):
        raise TypeError("a structure without bits")
    return Structure(record["heads"], record["channels"], heads, channels)


def _arrays(arrays: Mapping[str, Array]) -> ArrayRecord:
    order = {"names": json.dumps(list(arrays))}  # safetensors has one of its own
    content = save({name: np.asarray(array, order="C") for name, array in arrays.items()}, order)
    return ArrayRecord({SAFETENSORS: WireArray("uint8", (len(content),), SAFETENSORS, content)})


def _read_arrays(records: RecordDict, name: str) -> dict[str, Array]:
    content = cast(ArrayRecord, records[name])[SAFETENSORS].data
    arrays = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: cast(Array, arrays[name]) for name in json.loads(header["__metadata__"]["names"])}


def _scores(scores: Scores | None) -> ArrayRecord | None:
    if scores is None:
        return None
    parts = {
        f"{layer}.{unit}": part for layer, pair in enumerate(scores) for unit, part in zip(_UNITS, pair, strict=True)
    }
    return _arrays(parts)


def _read_scores(records: RecordDict) -> Scores | None:
    if "scores" not in records:
        return None
    parts = _read_arrays(records, "scores")
    return tuple((parts[f"{layer}.heads"], parts[f"{layer}.channels"]) for layer in range(len(parts) // 2))


_UNITS = ("heads", "channels")
