"""Data that is prepared once and mapped into memory by other processes."""

from __future__ import annotations

import os

import numpy as np
import pytest

from fedspine.config import RunConfig
from fedspine.data import prepared
from fedspine.data.encode import Encoded
from fedspine.data.prepared import FOLDER_VARIABLE, PreparedData, find, prepare, shared
from fedspine.model import load_tokenizer


def small(types: bool = False) -> PreparedData:
    def encoded(lengths: list[int]) -> Encoded:
        ids = np.arange(sum(lengths), dtype=np.int64)
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        return Encoded(ids, offsets, ids % 2 if types else None, np.arange(len(lengths)) % 2)

    rows = (np.array([0, 3]), np.array([1]), np.array([2, 4]))
    return PreparedData(encoded([2, 1, 3, 1, 4]), encoded([3, 2]), rows, ("no", "yes"))


def assert_same(found: PreparedData, data: PreparedData) -> None:
    assert found.classes == data.classes
    assert [rows.tolist() for rows in found.rows] == [rows.tolist() for rows in data.rows]
    for one, other in ((found.train, data.train), (found.test, data.test)):
        assert (one.types is None) == (other.types is None)
        for name in ("ids", "offsets", "labels", "types"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("types", [False, True])
def test_shared_data_is_found_as_it_was(types: bool) -> None:
    with shared(small(types), "settings"):
        found = find("settings")
        assert found is not None
        assert_same(found, small(types))
        assert isinstance(found.train.ids, np.memmap)
        folder = os.environ[FOLDER_VARIABLE]
    assert not os.path.exists(folder)
    assert FOLDER_VARIABLE not in os.environ


def test_data_of_other_settings_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("settings") is None
    with shared(small(), "settings"):
        assert find("other settings") is None
    monkeypatch.setenv(FOLDER_VARIABLE, "/a/folder/of/another/machine")
    assert find("settings") is None
    with shared(small(), "settings"):
        pass
    assert os.environ[FOLDER_VARIABLE] == "/a/folder/of/another/machine"


def test_a_workbench_takes_prepared_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker maps is what it would have made; it makes nothing then."""
    from fedspine.client_round import workbench

    config = RunConfig.from_values({"devices": 4, "sampled": 2})
    settings = config.to_json()
    data = prepare(config, load_tokenizer(config))
    with shared(data, settings):
        monkeypatch.setattr(prepared, "prepare", pytest.fail)
        monkeypatch.setattr("fedspine.client_round.prepare", pytest.fail)
        workbench.cache_clear()
        assert_same(workbench(settings).data, data)
    workbench.cache_clear()
