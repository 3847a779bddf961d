"""Client functions that need no model: module-level, so that Ray's workers can import them."""

import numpy as np

from fedspine.config import RunConfig
from fedspine.errors import ModelError
from fedspine.structure import Structure
from fedspine.types import (
    TRAINED,
    Action,
    Arrays,
    EvaluateReply,
    EvaluateRequest,
    Probe,
    ProbeRequest,
    Report,
    TrainReply,
    TrainRequest,
)

STRUCTURE = Structure(
    heads=12, channels=11, head_bits=(b"\xff\xf0", b"\x00\x10"), channel_bits=(b"\xaa\xa0", b"\x00\x00")
)
SETTINGS = RunConfig(classes=("é",)).to_json().replace("\\u00e9", "é")
USER_MISTAKE = "model = 'nonsense': no such folder"


def train(request: TrainRequest) -> TrainReply:
    """Adds round and device to every array. Rank 13 fails, rank 14 is a user's mistake."""
    if request.action.lora_rank == 13:
        raise ValueError("a broken\ndevice")
    if request.action.lora_rank == 14:
        raise ModelError(USER_MISTAKE)
    arrays = {name: array + np.float32(request.round + request.device / 7) for name, array in request.arrays.items()}
    report = Report(TRAINED, examples=request.device, loss_after=1 / 3)
    return TrainReply(request.device, report, request.structure, arrays, request.scores)


def probe(request: ProbeRequest) -> Probe:
    if request.lora_rank == 13:
        raise ValueError("no clock")
    return Probe((request.device + 1) / 3, 1e-9, 0.1, request.round)


def evaluate(request: EvaluateRequest) -> EvaluateReply:
    if request.round == 13:
        raise ValueError("no test set")
    return EvaluateReply(request.device, 7, request.device / 9, float(np.mean(np.abs(request.arrays["layer.q.A"]))))


def arrays(seed: int) -> Arrays:
    rng = np.random.default_rng([seed])
    return {
        "layer.q.A": rng.standard_normal((4, 9), dtype=np.float32),
        "layer.q.B": rng.standard_normal((6, 4), dtype=np.float32).T[:, ::2],
        "layer.o.A": np.zeros((4, 0), dtype=np.float32),
        "head.bias": np.array([np.nan, -0.0, np.inf, 1e-45], dtype=np.float32),
    }


def train_request(device: int, round: int = 1, rank: int = 8) -> TrainRequest:
    scores = tuple(
        (np.full(12, layer, dtype=np.float32), np.linspace(0, 1, 11, dtype=np.float32)) for layer in range(2)
    )
    return TrainRequest(
        round, device, Action(0.1, rank, device), STRUCTURE, arrays(device), scores if device % 2 else None, SETTINGS
    )


def probe_request(device: int, rank: int = 8) -> ProbeRequest:
    return ProbeRequest(3, device, STRUCTURE, rank, SETTINGS)


def evaluate_request(device: int, round: int = 1) -> EvaluateRequest:
    return EvaluateRequest(round, device, STRUCTURE, arrays(device), SETTINGS)


def flat(value: object) -> object:
    """A comparable form of replies and requests: arrays as (name, shape, dtype, bytes)."""
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, dict):
        return [(name, flat(item)) for name, item in value.items()]
    if isinstance(value, tuple | list):
        return [flat(item) for item in value]
    if isinstance(value, Structure) or not hasattr(value, "__dataclass_fields__"):
        return value
    return [type(value).__name__, *(flat(getattr(value, name)) for name in value.__dataclass_fields__)]
