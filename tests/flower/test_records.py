"""What leaves one side of the wire arrives bit for bit on the other, by both of Flower's serialisations."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedspine import __version__, errors
from fedspine.flower import records
from fedspine.flower.inline import InlineGrid
from fedspine.types import OUT_OF_MEMORY, EvaluateReply, Probe, Report, TrainReply
from tests.flower import fakes


def by_proto(content: RecordDict) -> RecordDict:
    """As the simulation and the in-process grid send it."""
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(content).SerializeToString()))


def by_objects(content: RecordDict) -> RecordDict:
    """As a SuperLink sends it: objects addressed by their content."""
    InlineGrid(None, 0)  # type: ignore[arg-type]  # gives Flower the identity that a message needs
    message = Message(content, 5, "train")
    wire = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    received = inflate_object_from_contents(message.object_id, wire)
    assert isinstance(received, Message)
    return received.content


REPORT = Report(
    OUT_OF_MEMORY,
    3,
    0.1,
    1 / 3,
    1e-300,
    2**40,
    5,
    float("inf"),
    -0.0,
    1e9,
    7,
    "needs 3 MB\nof 2 MB",
    {"seconds": 2.5, "probe batch": 1 / 3},
    9,
    (1 / 3, 0.0),
)
HALF = replace(
    fakes.train_request(3), arrays={name: value.astype(np.float16) for name, value in fakes.arrays(3).items()}
)
CASES: list[tuple[Any, Callable[[Any], RecordDict], Callable[[RecordDict], Any]]] = [
    (fakes.train_request(1), records.pack_train_request, records.unpack_train_request),
    (replace(fakes.train_request(2), missed_rank=80), records.pack_train_request, records.unpack_train_request),
    (HALF, records.pack_train_request, records.unpack_train_request),
    (
        TrainReply(4, REPORT, fakes.STRUCTURE, fakes.arrays(4), fakes.train_request(1).scores),
        records.pack_train_reply,
        records.unpack_train_reply,
    ),
    (TrainReply(4, Report("failed"), fakes.STRUCTURE, {}, None), records.pack_train_reply, records.unpack_train_reply),
    (fakes.probe_request(1), records.pack_probe_request, records.unpack_probe_request),
    (Probe(1e-12, 1 / 3, 0.0, 65536), records.pack_probe, records.unpack_probe),
    (fakes.evaluate_request(1), records.pack_evaluate_request, records.unpack_evaluate_request),
    (EvaluateReply(79, 1066, 0.1, 2.0), records.pack_evaluate_reply, records.unpack_evaluate_reply),
    (79, records.pack_identity, records.unpack_identity),
]


@pytest.mark.parametrize("send", [by_proto, by_objects])
@pytest.mark.parametrize(("value", "pack", "unpack"), CASES, ids=[type(case[0]).__name__ for case in CASES])
def test_round_trip_is_exact(
    send: Callable[[RecordDict], RecordDict],
    value: Any,
    pack: Callable[[Any], RecordDict],
    unpack: Callable[[RecordDict], Any],
) -> None:
    received = unpack(send(pack(value)))
    assert type(received) is type(value)
    assert fakes.flat(received) == fakes.flat(value)


def test_received_arrays_can_be_written_to() -> None:
    received = records.unpack_train_request(by_proto(records.pack_train_request(fakes.train_request(1))))
    received.arrays["layer.q.A"][:] = 0  # torch.from_numpy wants writable memory


def test_numpy_scalars_travel_as_plain_numbers() -> None:
    report = replace(REPORT, examples=np.int64(3), loss_before=np.float32(0.5), compute_seconds=1)
    received = records.unpack_train_reply(
        by_proto(records.pack_train_reply(TrainReply(0, report, fakes.STRUCTURE, {}, None)))
    ).report
    assert (type(received.examples), type(received.loss_before), type(received.compute_seconds)) == (int, float, float)


def test_a_user_error_travels_as_itself() -> None:
    content = by_proto(records.pack_user_error(errors.ModelError("model = 'x': absent")))
    with pytest.raises(errors.ModelError, match="model = 'x': absent"):
        records.read_failure(content)


@pytest.mark.parametrize("kind", ["annotations", "__name__", "FedSpineErrors"])
def test_only_our_own_errors_are_raised_by_name(kind: str) -> None:
    with pytest.raises(errors.FederationError, match="it"):
        records.read_failure(RecordDict({"error": ConfigRecord({"type": kind, "message": "it"})}))
    with pytest.raises(errors.FederationError, match="None"):
        records.read_failure(RecordDict({"error": ConfigRecord({})}))


def test_a_failure_travels_as_one_line() -> None:
    assert records.read_failure(by_proto(records.pack_failure("KeyError: 'x'"))) == "KeyError: 'x'"
    assert records.read_failure(by_proto(records.pack_identity(1))) is None


def test_another_version_of_the_configuration_is_an_error_with_its_keys() -> None:
    there = json.loads(fakes.SETTINGS) | {"telepathy": True}
    del there["close_at"]
    packed = records.pack_train_request(replace(fakes.train_request(1), settings=json.dumps(there)))
    packed["task"]["version"] = "0.0.7"
    expected = f"fedspine 0.0.7, this device {__version__}, .* server knows telepathy, only this device close_at"
    with pytest.raises(errors.ConfigError, match=expected):
        records.unpack_train_request(by_proto(packed))
