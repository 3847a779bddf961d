"""TensorBoard scalars, one point per round; a resumed run purges what came after its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from fedspine.types import RoundRecord


class Curves:
    """A context that writes to `directory` and closes it at the end. `cost`: whose clock the times are of."""

    def __init__(self, directory: Path, rounds_done: int, cost: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._cost = cost
        self._writer = SummaryWriter(str(directory), purge_step=rounds_done + 1 if rounds_done else None)

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def add(self, record: RoundRecord) -> None:
        values = {
            "accuracy/global": record.accuracy,
            "accuracy/smoothed": record.smoothed_accuracy,
            "loss/global": record.loss,
            f"{self._cost}/clock_seconds": record.clock_seconds,
            f"{self._cost}/round_seconds": record.round_seconds,
            f"{self._cost}/waiting_seconds": record.waiting_seconds,
            "bytes/uploaded": record.uploaded_bytes,
            "bytes/downloaded": record.downloaded_bytes,
            "sparsity/floor": record.floor_ratio,
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.round)
