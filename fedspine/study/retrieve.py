"""Retrieval from a user's own history: the nearest items vote for their class.

Exact search over at most some thousand items: one matrix product, or BM25. Nothing leaves the device. What is found
votes as in kNN-LM (Khandelwal et al., arXiv 1911.00172, eq. 2): by a softmax over similarity, here relative to the best
item's, so that cosines and BM25 scores need no scale of their own; with a tuned model the two distributions are mixed
(eq. 3) half and half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedspine.errors import DataError, ModelError

SHARPNESS = 10.0
"""An item that is half as similar as the best one weighs exp(-5) of it."""
ENCODER_BATCH = 32
ENCODER_TOKENS = 128
"""Of a text, that are looked at."""

Floats = NDArray[np.float64]


def similarities(retriever: str, queries: Sequence[str], items: Sequence[str], encoder: str) -> Floats:
    """[queries, items], larger is more alike: cosines of `encoder`'s mean token states (`dense`), or BM25 scores.

    Errors: `DataError` for an empty history; `ModelError` without the extra that BM25 needs, or for an encoder that
    cannot be loaded.
    """
    if not len(items):
        raise DataError(
            "retrieval from an empty history: the user has no examples; use learner = none, or examples > 0"
        )
    if retriever == "bm25":
        return _bm25(queries, items)
    vectors = embed([*items, *queries], encoder)
    similar: Floats = vectors[len(items) :] @ vectors[: len(items)].T
    return similar


def vote(similar: Floats, labels: NDArray[np.int64], classes: int, history: int) -> Floats:
    """[queries, classes]: shares of the classes among each query's `history` nearest items. Ties: the earlier item."""
    found_at = nearest(similar, history)
    found = np.take_along_axis(similar, found_at, 1)
    best = found[:, :1]
    weights = np.exp(SHARPNESS * (np.divide(found, best, out=np.ones_like(found), where=best > 0) - 1))
    votes = np.zeros((len(similar), classes))
    np.add.at(votes, (np.arange(len(similar))[:, None], labels[found_at]), weights)
    votes /= votes.sum(1, keepdims=True)
    return votes


def nearest(similar: Floats, history: int) -> NDArray[np.int64]:
    """[queries, at most `history`]: the items that are most alike, the best first. Ties: the earlier item."""
    return np.argsort(-similar, axis=1, kind="stable")[:, :history]


def embed(texts: Sequence[str], encoder: str) -> Floats:
    """Unit vectors [texts, hidden]: the mean of a model's last token states."""
    import torch
    from transformers import AutoModel

    from fedspine.config import RunConfig
    from fedspine.data.encode import encode, evaluation_batches
    from fedspine.model import load_tokenizer, model_source
    from fedspine.training import tensors

    tokenizer: Any = load_tokenizer(RunConfig(model=encoder))
    try:
        model = AutoModel.from_pretrained(model_source(encoder), use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"encoder '{encoder}' cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    length = min(int(model.config.max_position_embeddings), ENCODER_TOKENS)
    rows = encode(tokenizer, list(texts), None, np.arange(len(texts)), length)
    vectors = np.zeros((len(texts), int(model.config.hidden_size)))
    with torch.inference_mode():
        for batch in evaluation_batches(rows, ENCODER_BATCH, tokenizer.pad_token_id or 0):
            states = model(**tensors(batch, torch.device("cpu"))).last_hidden_state
            mask = torch.from_numpy(batch.attention_mask)[:, :, None]
            vectors[batch.labels] = ((states * mask).sum(1) / mask.sum(1)).numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def check_retriever(retriever: str) -> None:
    """Errors: `ModelError` when BM25 is asked for and not installed."""
    if retriever == "bm25":
        _bm25s()


def _bm25(queries: Sequence[str], items: Sequence[str]) -> Floats:
    library = _bm25s()
    options = {"stopwords": None, "show_progress": False, "return_ids": False}
    index = library.BM25()
    index.index(library.tokenize(list(items), **options), show_progress=False)
    scores = [index.get_scores(words) for words in library.tokenize(list(queries), **options)]
    return np.asarray(scores, dtype=np.float64)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise ModelError("retriever = 'bm25' needs bm25s: pip install 'fedspine[rag]'") from None
    return bm25s
