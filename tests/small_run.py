"""A model folder, a data folder and the keys of a run that takes a second: everything made here, nothing downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertTokenizerFast

from fedspine.methods import PLAIN
from fedspine.report.records import reproducible
from tests.tiny import tiny_config

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GOOD = ("good", "fine", "warm", "bright", "fresh")
BAD = ("bad", "poor", "cold", "dull", "stale")
OTHER = ("the", "a", "film", "book", "meal", "room", "was", "is", "very", "quite", "and", "so")
WORDS = (*SPECIAL, *GOOD, *BAD, *OTHER)
KEYS: dict[str, Any] = {
    "devices": 8,
    "sampled": 4,
    "rounds": 6,
    "local_iterations": 4,
    "prune_interval": 2,
    "batch_size": 4,
    "eval_every": 2,
    "probe_examples": 8,
    "target_sparsity": 0.4,
    "partition": "iid",
    "learning_rate": 1e-2,
    "max_length": 12,
    **PLAIN,
}
"""Besides `model` and `data`; the levers beyond the paper have tests of their own."""

MACHINE = ("engine", "workers", "wall_seconds", "startup_seconds", "local_compute_seconds", "peak_rss_bytes")
"""Keys of a summary that tell of this machine, not of the federation."""


def write_words(folder: Path, **settings: Any) -> BertTokenizerFast:
    """A tokenizer of 27 words."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder: Path, seed: int = 0, family: str = "bert", language: bool = False, **settings: Any) -> Path:
    """A BERT (or a model of another family, or its language model) of 2 layers with random weights; 27 words.

    `settings`: of its configuration.
    """
    words = write_words(folder, **({"eos_token": "[SEP]"} if language else {})).get_vocab()
    sizes = {"intermediate_size": 48, "max_position_embeddings": 16, "num_labels": 2, "pad_token_id": 0}
    config = tiny_config(family, vocab_size=len(words), **{**sizes, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = AutoModelForCausalLM if language else AutoModelForSequenceClassification
        kind.from_config(config).save_pretrained(folder)
    return folder


def write_data(folder: Path, train: int = 120, dev: int = 40, seed: int = 0) -> Path:
    """Short sentences of two classes; the fourth column names one of twelve writers."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, rows in (("train", train), ("dev", dev)):
        lines = ["text\tlabel\twriter"]
        for row in range(rows):
            words = [*rng.choice(OTHER, rng.integers(2, 6)), rng.choice((BAD, GOOD)[row % 2])]
            lines.append(f"{' '.join(rng.permutation(words))}\t{('bad', 'good')[row % 2]}\tw{row // 2 % 12}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def options(keys: dict[str, Any]) -> list[str]:
    """The keys as options of the command line."""
    return [part for key, value in keys.items() for part in ("-s", f"{key}={json.dumps(value)}")]


def rounds(directory: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl without what differs between machines."""
    lines = (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [reproducible(json.loads(line)) for line in lines]


def figures(directory: Path) -> dict[str, Any]:
    """summary.json without what differs between machines."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return {key: value for key, value in summary.items() if key not in MACHINE}
