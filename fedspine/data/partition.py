"""Who has which rows: the partitioners of flwr-datasets, and two that keep every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedspine.config import RunConfig
from fedspine.data.columns import TextTask
from fedspine.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

OWNER = "writer"
"""Column that names a row's owner in the embedded task."""
REDRAWS = 100
SHARDS_PER_DEVICE = 2

Rows = NDArray[np.int64]


def partition_rows(task: TextTask, config: RunConfig) -> tuple[Rows, ...]:
    """Sorted rows of the training set, one array per device.

    `auto` is `column:writer` where the task has that column, `dirichlet` elsewhere, and `iid` without classes. With
    more values than devices, `column:NAME` deals the sorted values out in turn. A Dirichlet draw that leaves a device
    short is drawn again. With `all` every device has every row.

    Errors: `DataError` when a device has no rows or too few classes; `ConfigError` for an unknown partition.
    """
    kind = config.partition
    if kind == "all":
        parts = (np.arange(len(task.train)),) * config.devices
        _check(parts[:1], task.train["label"].to_numpy(), task, config)
        return parts
    if kind == "auto":
        kind = f"column:{OWNER}" if OWNER in task.train else "dirichlet" if len(task.classes) > 1 else "iid"
    labels = task.train["label"].to_numpy()
    if kind.startswith("column:"):
        parts = _by_column(task, kind.removeprefix("column:"), config)
    elif kind == "iid":
        # Here and below: only now, because the import takes seconds and every worker would pay for it.
        from flwr_datasets.partitioner import IidPartitioner

        parts = _drawn(IidPartitioner(config.devices), labels, config.seed)
    elif kind == "shards":
        parts = _by_shards(labels, config)
    elif kind == "dirichlet":
        from flwr_datasets.partitioner import DirichletPartitioner

        for attempt in range(REDRAWS):
            seed = config.seed + 1_000_003 * attempt
            parts = _drawn(
                DirichletPartitioner(
                    config.devices, "label", alpha=config.dirichlet_alpha, min_partition_size=0, seed=seed
                ),
                labels,
            )
            if _short(parts, labels, config) is None:
                break
    else:
        raise ConfigError(f"partition = '{kind}': must be auto, iid, dirichlet, shards, all or column:NAME")
    _check(parts, labels, task, config)
    return parts


def _drawn(partitioner: Partitioner, labels: NDArray[np.int64], shuffle: int | None = None) -> tuple[Rows, ...]:
    from datasets import Dataset

    class Numbers(Dataset):  # type: ignore[misc]
        """Selects row numbers instead of rows: `datasets` needs milliseconds for a selection, and again to read it."""

        def select(self, indices: Any, *_: Any, **__: Any) -> Any:
            return indices

        def __getitem__(self, column: Any) -> Any:
            return self.data.column(column).to_numpy()

    order = np.arange(len(labels)) if shuffle is None else np.random.default_rng([shuffle, 13]).permutation(len(labels))
    partitioner.dataset = Numbers.from_dict({"label": labels[order]})
    parts = (partitioner.load_partition(device) for device in range(partitioner.num_partitions))
    return tuple(np.sort(order[np.asarray(part, dtype=np.int64)]) for part in parts)


def _by_shards(labels: NDArray[np.int64], config: RunConfig) -> tuple[Rows, ...]:
    """Rows sorted by label, cut into shards that differ by one row at most; flwr's partitioner drops the remainder."""
    rng = np.random.default_rng([config.seed, 14])
    shuffled = rng.permutation(len(labels))
    shards = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], config.devices * SHARDS_PER_DEVICE)
    dealt = rng.permutation(len(shards)).reshape(config.devices, SHARDS_PER_DEVICE)
    return tuple(np.sort(np.concatenate([shards[index] for index in mine])) for mine in dealt)


def _by_column(task: TextTask, name: str, config: RunConfig) -> tuple[Rows, ...]:
    if name not in task.train:
        raise DataError(
            f"partition = 'column:{name}': no such column in the data; it has {', '.join(map(str, task.train.columns))}"
        )
    owners = task.train[name].astype(str).to_numpy()
    values = sorted(set(owners))
    if len(values) < config.devices:
        raise DataError(
            f"partition = 'column:{name}': {len(values)} values for devices = {config.devices}; "
            f"use at most {len(values)} devices"
        )
    device_of = {value: index % config.devices for index, value in enumerate(values)}
    device = np.array([device_of[owner] for owner in owners])
    ends = np.cumsum(np.bincount(device, minlength=config.devices))[:-1]
    return tuple(np.split(np.argsort(device, kind="stable"), ends))


def _short(parts: tuple[Rows, ...], labels: NDArray[np.int64], config: RunConfig) -> int | None:
    """The first device without rows or, where classes are learned, with too few of them."""
    least = config.min_classes if config.task == "classification" else 1
    for device, rows in enumerate(parts):
        if len(rows) == 0 or len(np.unique(labels[rows])) < least:
            return device
    return None


def _check(parts: tuple[Rows, ...], labels: NDArray[np.int64], task: TextTask, config: RunConfig) -> None:
    device = _short(parts, labels, config)
    if device is None:
        return
    remedy = "use fewer devices, a larger dirichlet_alpha or another partition"
    if len(parts[device]) == 0:
        raise DataError(f"partition = '{config.partition}': device {device} has no rows; {remedy}")
    present = ", ".join(f"'{task.classes[label]}'" for label in np.unique(labels[parts[device]]))
    raise DataError(
        f"partition = '{config.partition}': device {device} has {len(parts[device])} rows of only {present}, "
        f"min_classes = {config.min_classes}; {remedy}, or set min_classes = 1 to allow it"
    )
