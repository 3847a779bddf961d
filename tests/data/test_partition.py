"""Every row has one owner, the same seed gives the same owners, and unusable partitions are refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

from fedspine.config import RunConfig
from fedspine.data.partition import partition_rows
from fedspine.data.task import TextTask, load_task
from fedspine.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
KINDS = ("iid", "dirichlet", "shards", "column:town")
SEEDED = ("iid", "dirichlet", "shards")


def task(rows: int = 240, classes: int = 3, **columns: Any) -> TextTask:
    rng = np.random.default_rng(4)
    train = pd.DataFrame({"text": "words", "label": rng.integers(0, classes, rows)})
    train["town"] = rng.choice(["bern", "rome", "oslo", "riga", "lima", "kyiv"], rows)
    names = tuple(f"class {index}" for index in range(classes))
    return TextTask("made", names, train.assign(**columns), train.head(2))


def config(partition: str, devices: int = 6, **values: Any) -> RunConfig:
    return RunConfig.from_values({"partition": partition, "devices": devices, "sampled": 1, **values})


def assert_every_row_once(parts: tuple[np.ndarray, ...], rows: int) -> None:
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(rows))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices", [1, 4, 6])
def test_every_row_has_one_owner(kind: str, devices: int) -> None:
    parts = partition_rows(task(), config(kind, devices, min_classes=1))
    assert len(parts) == devices
    assert_every_row_once(parts, 240)


@pytest.mark.parametrize("rows", [241, 245, 251])
@pytest.mark.parametrize("kind", ["iid", "dirichlet", "column:town"])
def test_every_row_has_one_owner_when_devices_do_not_divide_them(kind: str, rows: int) -> None:
    assert_every_row_once(partition_rows(task(rows), config(kind, min_classes=1)), rows)


@pytest.mark.parametrize("rows", [241, 245, 251])
def test_every_row_has_one_owner_when_shards_do_not_divide_them(rows: int) -> None:
    assert_every_row_once(partition_rows(task(rows), config("shards", min_classes=1)), rows)


def test_fewer_rows_than_shards_is_no_crash() -> None:
    """Seven rows for twelve shards: dealt out, or refused where a device would be left without."""
    with contextlib.suppress(DataError):
        assert_every_row_once(partition_rows(task(7), config("shards", min_classes=1)), 7)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
@pytest.mark.parametrize("devices", [1, 7, 40])
def test_rows_are_those_that_the_partitioners_load(kind: str, devices: int) -> None:
    """Partitions are read as row numbers; the partitioners' own data sets are slow, and say the same."""
    made, run = task(1_001), config(kind, devices, min_classes=1, dirichlet_alpha=5.0, seed=3)
    labels = made.train["label"].to_numpy()
    order = np.random.default_rng([3, 13]).permutation(1_001) if kind == "iid" else np.arange(1_001)
    partitioner = (
        IidPartitioner(devices)
        if kind == "iid"
        else DirichletPartitioner(devices, "label", alpha=5.0, min_partition_size=0, seed=3)
    )
    partitioner.dataset = Dataset.from_dict({"row": order, "label": labels[order]})
    for device, part in enumerate(partition_rows(made, run)):
        np.testing.assert_array_equal(part, np.sort(partitioner.load_partition(device)["row"]))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_rows(kind: str) -> None:
    first, again = (partition_rows(task(), config(kind, min_classes=1, seed=8)) for _ in range(2))
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("kind", SEEDED)
def test_other_seed_other_rows(kind: str) -> None:
    first, other = (partition_rows(task(), config(kind, min_classes=1, seed=seed)) for seed in (8, 9))
    assert any(not np.array_equal(left, right) for left, right in zip(first, other, strict=True))


def test_iid_parts_are_even_and_mixed_in_sorted_data() -> None:
    made = task(250, label=np.repeat(np.arange(2), 125))
    parts = partition_rows(made, config("iid"))
    assert {len(part) for part in parts} == {41, 42}
    labels = made.train["label"].to_numpy()
    assert all(0.2 < labels[part].mean() < 0.8 for part in parts)


def test_shards_give_few_classes_to_each_device() -> None:
    made = task(label=np.repeat(np.arange(6), 40), classes=6)
    labels = made.train["label"].to_numpy()
    parts = partition_rows(made, config("shards", min_classes=1))
    assert all(len(part) == 40 and len(np.unique(labels[part])) <= 2 for part in parts)


def test_smaller_alpha_is_more_skewed() -> None:
    made = task(600)
    labels = made.train["label"].to_numpy()

    def largest_share(alpha: float) -> float:
        parts = partition_rows(made, config("dirichlet", dirichlet_alpha=alpha))
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert largest_share(0.3) > largest_share(100.0) + 0.1


@pytest.mark.parametrize("seed", range(6))
def test_dirichlet_is_drawn_again_until_every_device_has_its_classes(seed: int) -> None:
    made = task(600)
    labels = made.train["label"].to_numpy()
    parts = partition_rows(made, config("dirichlet", 4, seed=seed, dirichlet_alpha=0.3, min_classes=3))
    assert all(len(np.unique(labels[part])) == 3 for part in parts)
    assert_every_row_once(parts, 600)


def test_some_first_dirichlet_draw_is_short() -> None:
    """Otherwise the test above would not see whether anything is drawn again."""
    made = task(600)
    labels = made.train["label"].to_numpy()
    fewest = []
    for seed in range(6):
        parts = partition_rows(made, config("dirichlet", 4, seed=seed, dirichlet_alpha=0.3, min_classes=1))
        fewest.append(min(len(np.unique(labels[part])) for part in parts))
    assert min(fewest) < 3


def test_column_gives_each_value_a_device() -> None:
    made = task()
    parts = partition_rows(made, config("column:town"))
    towns = [set(made.train["town"].iloc[part]) for part in parts]
    assert towns == [{town} for town in sorted(set(made.train["town"]))]


def test_column_deals_more_values_than_devices_out_in_turn() -> None:
    made = task()
    parts = partition_rows(made, config("column:town", 4))
    towns = [set(made.train["town"].iloc[part]) for part in parts]
    assert towns == [{"bern", "riga"}, {"kyiv", "rome"}, {"lima"}, {"oslo"}]


def test_column_of_numbers_may_own_rows() -> None:
    made = task(house=np.arange(240) % 6)
    parts = partition_rows(made, config("column:house"))
    assert [set(made.train["house"].iloc[part]) for part in parts] == [{index} for index in range(6)]


def test_auto_is_by_writer_where_there_are_writers() -> None:
    made = task(writer=[f"person {row % 6}" for row in range(240)])
    by_writer, auto = (partition_rows(made, config(kind)) for kind in ("column:writer", "auto"))
    for left, right in zip(by_writer, auto, strict=True):
        np.testing.assert_array_equal(left, right)


def test_auto_is_dirichlet_elsewhere() -> None:
    drawn, auto = (partition_rows(task(), config(kind)) for kind in ("dirichlet", "auto"))
    for left, right in zip(drawn, auto, strict=True):
        np.testing.assert_array_equal(left, right)


def test_embedded_task_gives_each_device_its_writer() -> None:
    run = config("auto", 5, data="embedded")
    made = load_task(run)
    parts = partition_rows(made, run)
    assert_every_row_once(parts, len(made.train))
    assert [made.train["writer"].iloc[part].nunique() for part in parts] == [1] * 5


def test_device_without_rows() -> None:
    with pytest.raises(DataError) as caught:
        partition_rows(task(30), config("dirichlet", 12, dirichlet_alpha=0.01, min_classes=1))
    message = str(caught.value)
    assert message.startswith("partition = 'dirichlet': device ")
    assert message.endswith("has no rows; use fewer devices, a larger dirichlet_alpha or another partition")


def test_device_of_one_class() -> None:
    made = task(label=np.repeat(np.arange(2), 120), home=np.repeat(["north", "south"], 120), classes=2)
    with pytest.raises(DataError) as caught:
        partition_rows(made, config("column:home", 2, min_classes=2))
    message = str(caught.value)
    assert message.startswith("partition = 'column:home': device 0 has 120 rows of only 'class 0', min_classes = 2; ")
    assert message.endswith("or set min_classes = 1 to allow it")
    assert_every_row_once(partition_rows(made, config("column:home", 2, min_classes=1)), 240)


def test_dirichlet_that_never_fits_ends_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"device \d+ has (no rows|1 rows of only 'class \d', min_classes = 2)"):
        partition_rows(task(9), config("dirichlet", 9))


def test_unknown_column() -> None:
    with pytest.raises(DataError, match=r"^partition = 'column:city': .*no such column.*; it has text, label, town$"):
        partition_rows(task(), config("column:city"))


def test_column_with_fewer_values_than_devices() -> None:
    with pytest.raises(DataError) as caught:
        partition_rows(task(), config("column:town", 7))
    assert str(caught.value) == "partition = 'column:town': 6 values for devices = 7; use at most 6 devices"


@pytest.mark.parametrize("kind", ["columns:town", "IID", "", "random"])
def test_unknown_partition(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        partition_rows(task(), config(kind))
    assert str(caught.value) == f"partition = '{kind}': must be auto, iid, dirichlet, shards, all or column:NAME"


@pytest.mark.data
def test_public_data_by_domain() -> None:
    """Ten domains of clinc150: one device each, all their fifteen intents and nothing else."""
    path = SHARED / "clinc150"
    if not path.is_dir():
        pytest.skip("../shared/data is absent: clinc150 was not read")
    run = config("column:domain", 10, data=str(path))
    made = load_task(run)
    parts = partition_rows(made, run)
    assert_every_row_once(parts, len(made.train))
    assert [made.train["label"].iloc[part].nunique() for part in parts] == [15] * 10
