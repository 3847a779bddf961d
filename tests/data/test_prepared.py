"""Data that is prepared once and mapped into memory by other processes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedspine.config import RunConfig
from fedspine.data.prepared import FOLDER_VARIABLE, PreparedData, Rows, Texts, find, prepare, shared


def small(pairs: bool = False) -> PreparedData:
    def rows(*texts: str) -> Rows:
        second = Texts.of([text[::-1] for text in texts]) if pairs else None
        return Rows(Texts.of(texts), second, np.arange(len(texts)) % 2)

    owned = (np.array([0, 3]), np.array([1]), np.array([2, 4]))
    return PreparedData(rows("one", "", "drei \u00e4", "four", "5"), rows("six", "sept"), owned, ("no", "yes"))


def assert_same(found: PreparedData, data: PreparedData) -> None:
    assert found.classes == data.classes
    assert [rows.tolist() for rows in found.owned] == [rows.tolist() for rows in data.owned]
    for one, other in ((found.train, data.train), (found.test, data.test)):
        everything = np.arange(len(other))
        assert one.texts.take(everything) == other.texts.take(everything)
        assert (one.pairs is None) == (other.pairs is None)
        if one.pairs is not None and other.pairs is not None:
            assert one.pairs.take(everything) == other.pairs.take(everything)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_texts_come_back_as_they_were() -> None:
    strings = ["plain", "", "\u00e4\u00f6\u00fc \U0001f600", "two\nlines"]
    assert Texts.of(strings).take(np.array([3, 0, 2, 1])) == [strings[3], strings[0], strings[2], strings[1]]


@pytest.mark.parametrize("pairs", [False, True])
def test_shared_data_is_found_as_it_was(pairs: bool) -> None:
    with shared(small(pairs), "settings"):
        found = find("settings")
        assert found is not None
        assert_same(found, small(pairs))
        if (maps := Path("/proc/self/maps")).exists():  # on Linux one can see that nothing was copied
            assert os.environ[FOLDER_VARIABLE] in maps.read_text()
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
    from fedspine.workbench import workbench

    config = RunConfig.from_values({"devices": 4, "sampled": 2})
    settings = config.to_json()
    data = prepare(config)
    with shared(data, settings):
        monkeypatch.setattr("fedspine.workbench.prepare", pytest.fail)
        workbench.cache_clear()
        assert_same(workbench(settings).data, data)
    workbench.cache_clear()
