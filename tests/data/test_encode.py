"""Ragged ids, padding and the order of batches against plain lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedspine.data.encode import (
    CHUNK_BATCHES,
    Batch,
    Encoded,
    balanced_sample,
    encode,
    evaluation_batches,
    training_batches,
)

PAD = 7


def rows_of(count: int, seed: int = 0) -> list[list[int]]:
    """Rows of 1 to 9 ids; the first id is the row's own number."""
    rng = np.random.default_rng(seed)
    return [[100 + row, *rng.integers(8, 60, rng.integers(0, 9))] for row in range(count)]


def encoded(rows: list[list[int]], types: bool = False) -> Encoded:
    flat = np.array([item for row in rows for item in row], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Encoded(flat, offsets, flat % 2 if types else None, np.arange(len(rows)) % 3)


def as_lists(item: Encoded) -> list[list[int]]:
    return [item.ids[start:stop].tolist() for start, stop in zip(item.offsets[:-1], item.offsets[1:], strict=True)]


def members(batch: Batch) -> list[int]:
    """Which rows are in a batch, by their first ids."""
    return [int(first) - 100 for first in batch.input_ids[:, 0]]


class Words:
    """Stands in for a tokenizer: a word is its length, pairs are told apart by type ids."""

    def __init__(self, types: bool) -> None:
        self.types = types

    def __call__(self, texts: list[str], pairs: list[str] | None, **options: Any) -> dict[str, list[list[int]]]:
        assert options["truncation"]
        firsts = [[len(word) for word in text.split()] for text in texts]
        seconds = [[len(word) for word in text.split()] for text in pairs] if pairs else [[] for _ in texts]
        limit = options["max_length"]
        out = {"input_ids": [(one + two)[:limit] for one, two in zip(firsts, seconds, strict=True)]}
        if self.types:
            kinds = zip(firsts, seconds, strict=True)
            out["token_type_ids"] = [([0] * len(one) + [1] * len(two))[:limit] for one, two in kinds]
        return out


FRAME = pd.DataFrame(
    {"text": ["a bb ccc", "dddd", "a a"], "text_pair": ["bb", "a ccc", "bb bb bb"], "label": [2, 0, 1]}
)


def test_encode_keeps_rows_apart() -> None:
    out = encode(Words(types=False), FRAME["text"].tolist(), None, FRAME["label"].to_numpy(), max_length=8)
    assert as_lists(out) == [[1, 2, 3], [4], [1, 1]]
    assert out.types is None
    assert out.labels.tolist() == [2, 0, 1]
    assert out.lengths.tolist() == [3, 1, 2]
    assert len(out) == 3


def test_encode_takes_pairs_types_and_the_longest_length() -> None:
    out = encode(Words(types=True), FRAME["text"].tolist(), FRAME["text_pair"].tolist(), FRAME["label"].to_numpy(), 4)
    assert as_lists(out) == [[1, 2, 3, 2], [4, 1, 3], [1, 1, 2, 2]]
    assert out.types is not None
    assert out.types.tolist() == [0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1]
    assert {array.dtype for array in (out.ids, out.offsets, out.types, out.labels)} == {np.dtype(np.int64)}


@pytest.mark.parametrize("chosen", [[0, 1, 2], [4, 0], [3], [2, 2, 5, 2], list(range(19, -1, -1)), []])
def test_take_is_row_selection(chosen: list[int]) -> None:
    rows = rows_of(20)
    whole = encoded(rows, types=True)
    part = whole.take(np.array(chosen, dtype=np.int64))
    assert as_lists(part) == [rows[index] for index in chosen]
    assert part.labels.tolist() == [whole.labels[index] for index in chosen]
    assert part.types is not None
    assert part.types.tolist() == [item % 2 for index in chosen for item in rows[index]]


def test_take_of_a_part_is_a_part_of_the_whole() -> None:
    rows = rows_of(20)
    part = encoded(rows).take(np.array([9, 4, 13, 2])).take(np.array([2, 0]))
    assert as_lists(part) == [rows[13], rows[9]]


@pytest.mark.parametrize("types", [False, True])
def test_batches_are_padded_to_their_longest_row(types: bool) -> None:
    rows = rows_of(23, seed=1)
    for batch in evaluation_batches(encoded(rows, types), 5, PAD):
        inside = [rows[index] for index in members(batch)]
        width = max(map(len, inside))
        assert batch.input_ids.tolist() == [row + [PAD] * (width - len(row)) for row in inside]
        assert batch.attention_mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in inside]
        assert batch.labels.tolist() == [index % 3 for index in members(batch)]
        if types:
            assert batch.token_type_ids is not None
            expected = [[item % 2 for item in row] + [0] * (width - len(row)) for row in inside]
            assert batch.token_type_ids.tolist() == expected
        else:
            assert batch.token_type_ids is None
        assert {array.dtype for array in (batch.input_ids, batch.attention_mask)} == {np.dtype(np.int64)}


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_evaluation_covers_every_row_once(batch_size: int) -> None:
    batches = list(evaluation_batches(encoded(rows_of(23)), batch_size, PAD))
    assert len(batches) == -(-23 // batch_size)
    assert sorted(row for batch in batches for row in members(batch)) == list(range(23))
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths)


@pytest.mark.parametrize("count", [CHUNK_BATCHES * 4, CHUNK_BATCHES * 4 * 2 + 12, 8, 4])
def test_an_epoch_of_training_covers_every_row_once(count: int) -> None:
    """Also over chunk borders; three epochs, each a fresh permutation."""
    per_epoch = count // 4
    batches = list(training_batches(encoded(rows_of(count)), 4, 3 * per_epoch, np.random.default_rng(0), PAD))
    seen = [row for batch in batches for row in members(batch)]
    epochs = [seen[start : start + count] for start in range(0, 3 * count, count)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count > 4:
        assert epochs[0] != epochs[1]


def test_short_last_batch_of_an_epoch_is_dropped() -> None:
    batches = list(training_batches(encoded(rows_of(11)), 4, 10, np.random.default_rng(0), PAD))
    assert [len(batch.labels) for batch in batches] == [4] * 10
    for start in range(0, 10, 2):
        epoch = [row for batch in batches[start : start + 2] for row in members(batch)]
        assert len(set(epoch)) == 8
    assert {row for batch in batches for row in members(batch)} == set(range(11))


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_rows_than_a_batch_are_one_whole_epoch(count: int) -> None:
    batches = list(training_batches(encoded(rows_of(count)), 8, 5, np.random.default_rng(0), PAD))
    assert len(batches) == 5
    assert all(sorted(members(batch)) == list(range(count)) for batch in batches)


@pytest.mark.parametrize("iterations", [0, 1, 5, 9])
def test_as_many_batches_as_iterations(iterations: int) -> None:
    batches = training_batches(encoded(rows_of(16)), 4, iterations, np.random.default_rng(0), PAD)
    assert len(list(batches)) == iterations


def test_training_order_is_drawn_by_the_generator() -> None:
    first, again, other = (
        [members(batch) for batch in training_batches(encoded(rows_of(40)), 4, 15, np.random.default_rng(seed), PAD)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_equal_turns_give_batches_of_like_length() -> None:
    """Of devices with other rows, also as many as fill no chunk: joined, they pad less."""

    def padded(equal: bool) -> int:
        streams = [
            training_batches(
                encoded(rows_of(count)), 4, 40, np.random.default_rng(count), PAD, np.random.default_rng(equal or count)
            )
            for count in (70, 83, 96, 160)
        ]
        return sum(max(batch.input_ids.shape[1] for batch in joined) for joined in zip(*streams, strict=True))

    assert padded(True) < 0.9 * padded(False)


def test_training_pads_less_than_a_plain_permutation() -> None:
    whole = encoded(rows_of(320))
    batches = list(training_batches(whole, 4, 80, np.random.default_rng(0), PAD))
    sorted_by_chunk = sum(batch.input_ids.size for batch in batches)
    order = np.random.default_rng(0).permutation(320).reshape(80, 4)
    assert sorted_by_chunk < sum(4 * whole.lengths[rows].max() for rows in order)
    widths = [batch.input_ids.shape[1] for batch in batches[:CHUNK_BATCHES]]
    assert widths != sorted(widths)  # the batches of a chunk come in no order of length


def test_balanced_sample_is_even_over_classes() -> None:
    labels = np.array([0] * 80 + [1] * 15 + [2] * 5)
    rows = balanced_sample(labels, 12, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
    assert (np.diff(rows) > 0).all()


def test_balanced_sample_fills_up_where_a_class_is_used_up() -> None:
    labels = np.array([0] * 80 + [1] * 15 + [2] * 2)
    assert np.bincount(labels[balanced_sample(labels, 12, np.random.default_rng(0))]).tolist() == [5, 5, 2]


@pytest.mark.parametrize("count", [6, 7, 100])
def test_balanced_sample_has_at_most_all_rows(count: int) -> None:
    labels = np.array([0, 0, 3, 3, 3, 5])
    assert balanced_sample(labels, count, np.random.default_rng(0)).tolist() == list(range(6))


def test_balanced_sample_is_drawn_by_the_generator() -> None:
    labels = np.arange(60) % 3
    first, again, other = (balanced_sample(labels, 9, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_balanced_sample_smaller_than_the_classes_takes_each_at_most_once() -> None:
    labels = np.arange(50) % 10
    rows = balanced_sample(labels, 4, np.random.default_rng(0))
    assert len(set(labels[rows].tolist())) == 4
