"""What is known before anything runs, as labelled votes for configurations.

A rule has an identifier, a source and a strength: 1 for what a paper or its reviews say, a half for what we read into
them, 1 for what was measured on this very task. Guidelines are qualitative: a vote says which way, never how much is
gained. Evidence from earlier studies counts double, and a probe decides before all votes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedspine.study.design import Point
from fedspine.study.difficulty import Difficulty, TextDifficulty

COLD_START = 10
"""Examples up to which a user counts as new (our choice)."""
FEW = 50
"""Examples up to which personal data count as limited (our choice)."""
CLEAR_GAIN, NO_GAIN = 0.3, 0.05
"""Of retrieval on the user's own history (our choice)."""
SMALL_RANK = 8
UNCUT = ("none", "bf16", "int8", "nf4")
"""Compressions that leave all weights; nf4 has 4.1 bits of each."""
TIERS = ("learner", "model", "how")
SHORT, LONG = 60, 240
"""Budgets of the candidates, in steps (our choice)."""


@dataclass(frozen=True)
class Context:
    """What the rules look at besides a configuration."""

    examples: int
    difficulty: Difficulty | TextDifficulty
    strongest: str
    """The largest model of the candidates that fit: the stand-in for the best on general benchmarks."""
    models: int
    """How many of the candidates' models fit."""


@dataclass(frozen=True)
class Rule:
    name: str
    text: str
    source: str
    strength: float
    decides: str
    """One of `TIERS`: that a small rank is best for LoRA does not speak for LoRA."""
    votes: Callable[[Point, Context], bool]


def _trains(point: Point) -> bool:
    return "lora" in str(point["learner"])


def _retrieves(point: Point) -> bool:
    return "rag" in str(point["learner"])


def _compressed(point: Point) -> bool:
    return _trains(point) and point["compression"] != "none"


_PAPER, _REVIEW, _OURS = "2406.03777 [abstract]", "2406.03777 [review]", "our reading of 2406.03777"
_SALEMI, _HERE = "2409.09510", "measured on this task"
RULES = (
    Rule("cold start", "with few examples RAG is better than LoRA", _SALEMI, 1.0, "learner",
         lambda point, at: at.examples <= COLD_START and point["learner"] == "rag"),
    Rule("both", "RAG with LoRA is better than either alone, if little", _SALEMI, 0.5, "learner",
         lambda point, at: at.examples > COLD_START and point["learner"] == "rag+lora"),
    Rule("G2", "on tasks of moderate difficulty RAG", _REVIEW, 1.0, "learner",
         lambda point, at: at.difficulty.band == "moderate" and _retrieves(point)),
    Rule("G3a", "on easy tasks LoRA", _OURS, 0.5, "learner",
         lambda point, at: at.difficulty.band == "easy" and at.examples > COLD_START and point["learner"] == "lora"),
    Rule("G3b", "on hard tasks LoRA on a strong model", _OURS, 0.5, "learner",
         lambda point, at: at.difficulty.band == "hard" and at.examples > COLD_START and _trains(point)),
    Rule("G4", "hard tasks need the strongest model that fits, compressed or not", _REVIEW, 1.0, "model",
         lambda point, at: at.difficulty.band != "easy" and at.models > 1 and point["model"] == at.strongest),
    Rule("large", "a larger model in few bits is better than a smaller one in many, from 3.5 bits a weight on",
         "2505.15030", 1.0, "model",
         lambda point, at: at.difficulty.band != "easy" and at.models > 1 and point["model"] == at.strongest
         and point["compression"] in UNCUT),
    Rule("G6", "a small rank suffices", _REVIEW, 1.0, "how",
         lambda point, at: _trains(point) and point["rank"] <= SMALL_RANK),
    Rule("G7", "longer tuning does not necessarily help: begin with the short budget", _PAPER, 1.0, "how",
         lambda point, at: _trains(point) and point["budget"] == SHORT),
    Rule("G9", "with little personal data a compressed model may learn better", _PAPER, 0.5, "how",
         lambda point, at: at.examples <= FEW and _compressed(point)),
    Rule("G10", "compression costs quality", _REVIEW, 1.0, "how",
         lambda point, at: (at.examples > FEW or not _trains(point)) and point["compression"] == "none"),
    Rule("history answers", "retrieval answers much of the user's own history", _HERE, 1.0, "learner",
         lambda point, at: at.difficulty.retrieval_gain >= CLEAR_GAIN and _retrieves(point)),
    Rule("history is mute", "retrieval answers nothing of the user's own history", _HERE, 1.0, "learner",
         lambda point, at: at.difficulty.retrieval_gain <= NO_GAIN and at.examples > COLD_START
         and point["learner"] == "lora"),
)  # fmt: skip


def votes(point: Point, at: Context) -> list[Rule]:
    """The rules that speak for a configuration."""
    return [rule for rule in RULES if rule.votes(point, at)]
