"""FedSpine with the same work: method fedavg on the inline engine, evaluation off the clock.

    python -m benchmarks.peers.ours --data DIR [--dtype bfloat16] [--sparsity 0.5]

With a sparsity every device is cut to it from the second round on, which is the first that counts.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peers import common
from benchmarks.peers.common import Work
from fedspine.config import RunConfig
from fedspine.report.observer import Silent
from fedspine.simulation import simulate
from fedspine.types import TRAINED, RoundRecord


def main() -> None:
    parser = common.harness_options()
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--sparsity", type=float, default=0.0)
    options = parser.parse_args()
    work, watch = common.start(options), Watch()
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data(work, data)
        result = simulate(config(work, data, options.dtype, options.sparsity), out=Path(folder) / "run", observer=watch)
    for record in result.records:
        check(work, record, options.sparsity)
    reached = result.records[-1].accuracy
    assert reached is not None
    common.report(watch.seconds, reached, "fedspine", "flwr")


def config(work: Work, data: Path, dtype: str, sparsity: float) -> RunConfig:
    return RunConfig.from_values(
        {
            "method": "fedavg",
            "seed": work.seed,
            "data": str(data),
            "partition": "column:client",
            "min_classes": 1,
            "max_length": common.MAX_LENGTH,
            "devices": common.CLIENTS,
            "sampled": work.sampled,
            "rounds": work.all_rounds,
            "local_iterations": work.steps,
            "prune_interval": work.steps,
            "batch_size": common.BATCH,
            "learning_rate": common.LEARNING_RATE,
            "clip_norm": common.CLIP_NORM,
            "dtype": dtype,
            "lora_targets": ("q", "v"),
            "lora_scale": common.ALPHA / common.RANK,
            "min_rank": common.RANK,
            "max_rank": common.RANK,
            "fixed_rank": common.RANK,
            "target_sparsity": sparsity,
            "schedule": "one-shot",
            "warmup_ratio": 0.0,
            "eval_every": work.all_rounds,
            "eval_devices": 1,
        }
    )


def write_data(work: Work, folder: Path) -> None:
    """The rows with their client in a column of its own."""
    folder.mkdir()
    rows = common.read_rows(work.data / "train.tsv")
    owners = common.owners(len(rows), work.seed)
    lines = [f"{text}\t{label}\t{owner:02d}" for (text, label), owner in zip(rows, owners, strict=True)]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel\tclient", *lines]) + "\n", encoding="utf-8")
    (folder / "dev.tsv").write_bytes((work.data / "dev.tsv").read_bytes())


class Watch(Silent):
    """Seconds from the end of a round to the end of the next, its evaluation left out; 0 for the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def round_done(self, record: RoundRecord) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last - record.wall["evaluate"] if self._last else 0.0)
        self._last = now


def check(work: Work, record: RoundRecord, sparsity: float) -> None:
    """That a round was the work of the comparison.

    Errors: `RuntimeError` for other clients, one that did not train, or one that was cut less.
    """
    if [pull.device for pull in record.pulls] != common.clients_of(work, record.round):
        raise RuntimeError(f"round {record.round} had other clients than the peers")
    if any(pull.report.outcome != TRAINED for pull in record.pulls):
        raise RuntimeError(f"a client of round {record.round} did not train")
    if record.round > common.WARM_UP and any(pull.ratio_after < sparsity - 0.01 for pull in record.pulls):
        raise RuntimeError(f"a client of round {record.round} was cut less than to {sparsity}")


if __name__ == "__main__":
    main()
