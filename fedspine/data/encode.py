"""Token ids as flat arrays, and batches with little padding. Numpy only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""The label of a token on which no loss is taken, as in transformers and torch."""
CHUNK_BATCHES = 8
"""Batches that are sorted by length together: less padding, still every example once per epoch."""


@dataclass(frozen=True)
class Encoded:
    """Ragged token ids: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    types: NDArray[np.int64] | None
    """Token type ids beside `ids`, for tokenizers that give them."""
    labels: NDArray[np.int64]
    """One per row."""
    learned: NDArray[np.bool_] | None = None
    """Of a language model: the tokens, beside `ids`, on which the loss is taken."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def answers(self) -> NDArray[np.int64]:
        """All that is to be predicted: the labels, or the learned tokens."""
        return self.labels if self.learned is None else self.ids[self.learned]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, rows: NDArray[np.int64]) -> Encoded:
        """The given rows, in the given order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        types, learned = (None if each is None else each[index] for each in (self.types, self.learned))
        return Encoded(self.ids[index], offsets, types, self.labels[rows], learned)


@dataclass(frozen=True)
class Batch:
    """Padded to its longest row; all int64 [rows, length].

    Labels are classes [rows], or of a language model the tokens [rows, length] with `IGNORED` where none is learned.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    token_type_ids: NDArray[np.int64] | None
    labels: NDArray[np.int64]


def encode(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, labels: NDArray[np.int64], max_length: int
) -> Encoded:
    """Tokenize texts, or pairs of texts."""
    out = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in out["input_ids"]])]).astype(np.int64)
    types = None
    if "token_type_ids" in out:
        types = np.concatenate([np.asarray(row, dtype=np.int64) for row in out["token_type_ids"]])
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in out["input_ids"]])
    return Encoded(ids, offsets, types, labels)


def training_batches(
    encoded: Encoded,
    batch_size: int,
    iterations: int,
    rng: np.random.Generator,
    pad_id: int,
    turns: np.random.Generator | None = None,
) -> Iterator[Batch]:
    """`iterations` batches over fresh permutations, rows of like length together within chunks of batches.

    A short last batch of an epoch is dropped unless it is the only one. `turns` draws in which order the batches of a
    chunk come, from short to long (`rng` if there is none): with equal turns, the batches of several devices are of
    like length in every iteration, and pad little when they are joined.
    """
    turns = turns or rng
    done = 0
    while True:
        order = rng.permutation(len(encoded))
        if len(order) > batch_size:
            order = order[: len(order) // batch_size * batch_size]
        for start in range(0, len(order), CHUNK_BATCHES * batch_size):
            chunk = order[start : start + CHUNK_BATCHES * batch_size]
            chunk = chunk[np.argsort(encoded.lengths[chunk], kind="stable")]
            batches = -(-len(chunk) // batch_size)
            places = turns.permutation(CHUNK_BATCHES) * batches // CHUNK_BATCHES  # twice the same in a short chunk
            for index in dict.fromkeys(places.tolist()):
                if done == iterations:
                    return
                done += 1
                yield _batch(encoded, chunk[index * batch_size : (index + 1) * batch_size], pad_id)


def evaluation_batches(encoded: Encoded, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, sorted by length."""
    order = np.argsort(encoded.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield _batch(encoded, order[start : start + batch_size], pad_id)


def balanced_sample(labels: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Up to `count` rows, as even over the classes present as they allow, without replacement."""
    shuffled = rng.permutation(len(labels))
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_label = shuffled[labels[shuffled] == label]
        turn[of_label] = np.arange(len(of_label))
    order = shuffled[np.argsort(turn[shuffled], kind="stable")]
    return np.sort(order[:count])


def _batch(encoded: Encoded, rows: NDArray[np.int64], pad_id: int) -> Batch:
    part = encoded.take(rows)
    lengths = part.lengths
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = part.ids
    types = None
    if part.types is not None:
        types = np.zeros(mask.shape, dtype=np.int64)
        types[mask] = part.types
    labels = part.labels
    if part.learned is not None:
        labels = np.full(mask.shape, IGNORED, dtype=np.int64)
        labels[mask] = np.where(part.learned, part.ids, IGNORED)
    return Batch(ids, mask.astype(np.int64), types, labels)
