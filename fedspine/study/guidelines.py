"""What is said about learning on small devices, and what a study says to it.

The guidelines are qualitative, and none of their numbers is known: those of Qin et al. (arXiv 2406.03777) from its
abstract [abstract] or as its public reviews quote it [review]; one from Salemi and Zamani (arXiv 2409.09510). Each is a
set of claims about contrasts, declared here and not chosen after the fact. A study holds them against its own cells:

- supported: every claim is, by the 95 % interval and the p-value corrected over all claims of the report (Holm);
- contradicted: some claim is separably the other way round;
- cannot tell: anything else, or fewer than three seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedspine.study.evidence import Contrast, Evidence
from fedspine.study.statistics import LEVEL, holm
from fedspine.study.workload import PEFT_LEARNERS

SUPPORTED, CONTRADICTED, CANNOT_TELL = "supported", "contradicted", "cannot tell"
LEAST_SEEDS = 3
NO_GAIN = 0.02
"""A gain that is smaller for certain counts as none (our choice)."""
ABOVE, NOT_ABOVE = "above 0", f"no gain (below {NO_GAIN})"
SIGN = "another sign on another task"
"""Of G1: no claim about one task, but about all together."""
SEPARABLE = "separable"


@dataclass(frozen=True)
class Claim:
    """What a guideline says about a contrast."""

    contrast: Contrast
    expected: str


@dataclass(frozen=True)
class Guideline:
    name: str
    text: str
    source: str
    needs: str
    """What a design must vary to say something."""
    claims: Callable[[Evidence], Iterator[Claim]]


@dataclass(frozen=True)
class Verdict:
    guideline: Guideline
    verdict: str
    why: str
    claims: tuple[tuple[Claim, float, str], ...]
    """Each with its corrected p-value and its own verdict."""


def verdicts(evidence: Evidence) -> list[Verdict]:
    """Of every guideline; those that the design does not touch cannot be told, and say what they need."""
    stated = [(guideline, list(guideline.claims(evidence))) for guideline in GUIDELINES]
    corrected = iter(holm([claim.contrast.interval.p for _, claims in stated for claim in claims]))
    return [_verdict(guideline, [(claim, next(corrected)) for claim in claims]) for guideline, claims in stated]


def _verdict(guideline: Guideline, claims: list[tuple[Claim, float]]) -> Verdict:
    judged = tuple((claim, p, _judged(claim, p)) for claim, p in claims)
    found = [verdict for _, _, verdict in judged]
    if not judged:
        return Verdict(guideline, CANNOT_TELL, f"not in this design: it needs {guideline.needs}", ())
    seeds = min(claim.contrast.interval.seeds for claim, _ in claims)
    if seeds < LEAST_SEEDS:
        return Verdict(guideline, CANNOT_TELL, f"{seeds} of at least {LEAST_SEEDS} seeds", judged)
    if guideline.name == "G1":
        signs = {claim.contrast.interval.mean > 0 for claim, p in claims if _separable(claim, p)}
        told = [verdict for verdict in found if verdict != CANNOT_TELL]
        if len(signs) == 2:
            return Verdict(guideline, SUPPORTED, "the better of the two changes from task to task", judged)
        return Verdict(guideline, CONTRADICTED if len(told) > 1 else CANNOT_TELL, "", judged)
    if CONTRADICTED in found:
        return Verdict(guideline, CONTRADICTED, "", judged)
    return Verdict(guideline, SUPPORTED if set(found) == {SUPPORTED} else CANNOT_TELL, "", judged)


def _separable(claim: Claim, p: float) -> bool:
    interval = claim.contrast.interval
    return p < 1 - LEVEL and (interval.low > 0 or interval.high < 0)


def _judged(claim: Claim, p: float) -> str:
    interval, separable = claim.contrast.interval, _separable(claim, p)
    if claim.expected == NOT_ABOVE:
        return SUPPORTED if interval.high < NO_GAIN else CONTRADICTED if separable and interval.low > 0 else CANNOT_TELL
    if not separable:
        return CANNOT_TELL
    if claim.expected == SIGN:
        return SEPARABLE
    return SUPPORTED if interval.low > 0 else CONTRADICTED


def _some(expected: str, *contrasts: Contrast | None) -> Iterator[Claim]:
    yield from (Claim(contrast, expected) for contrast in contrasts if contrast is not None)


def _by_task(evidence: Evidence) -> Iterator[Claim]:
    tasks = evidence.levels("task")
    if len(tasks) > 1:
        yield from _some(SIGN, *(evidence.difference("learner", "rag", "lora", task=task) for task in tasks))


def _weaker_learners(evidence: Evidence) -> Iterator[Claim]:
    for weaker in (each for each in evidence.levels("learner") if each in PEFT_LEARNERS):
        yield from _some(ABOVE, *(evidence.difference("learner", better, weaker) for better in ("lora", "rag")))


def _more_is_no_better(factor: str) -> Callable[[Evidence], Iterator[Claim]]:
    def claims(evidence: Evidence) -> Iterator[Claim]:
        levels = evidence.levels(factor)
        if len(levels) > 1:
            yield from _some(NOT_ABOVE, evidence.difference(factor, levels[-1], levels[-2]))

    return claims


def _small_rank(evidence: Evidence) -> Iterator[Claim]:
    """Of LoRA: the rank of the others is how many virtual tokens they have."""
    return _more_is_no_better("rank")(evidence.without("learner", PEFT_LEARNERS))


def _compressed(evidence: Evidence) -> list[str]:
    return [level for level in evidence.levels("compression") if level != "none"]


def _compressed_better_at_few(evidence: Evidence) -> Iterator[Claim]:
    counts = evidence.levels("examples")
    if len(counts) > 1:
        for level in _compressed(evidence):
            few, many = counts[0], counts[-1]
            yield from _some(ABOVE, evidence.interaction("compression", level, "none", "examples", few, many))


def _compression_costs(evidence: Evidence) -> Iterator[Claim]:
    yield from _some(ABOVE, *(evidence.difference("compression", "none", level) for level in _compressed(evidence)))


def _cold_start(evidence: Evidence) -> Iterator[Claim]:
    counts = evidence.levels("examples")
    if len(counts) > 1:
        yield from _some(ABOVE, evidence.difference("learner", "rag", "lora", examples=counts[0]))


def _both_best(evidence: Evidence) -> Iterator[Claim]:
    yield from _some(ABOVE, *(evidence.difference("learner", "rag+lora", alone) for alone in ("rag", "lora")))


_PAPER, _REVIEW, _SALEMI = "2406.03777 [abstract]", "2406.03777 [review]", "2409.09510"
GUIDELINES = (
    Guideline(
        "G1",
        "Whether LoRA or RAG is better depends on the task.",
        _PAPER,
        "rag and lora on two tasks",
        _by_task,
    ),
    Guideline(
        "G5",
        "IA3, prompt and prefix tuning are weaker than LoRA and than RAG.",
        _REVIEW,
        "lora or rag, and ia3, prompt or prefix",
        _weaker_learners,
    ),
    Guideline("G6", "A small rank suffices.", _REVIEW, "two ranks", _small_rank),
    Guideline("G7", "Longer tuning does not necessarily help.", _PAPER, "two budgets", _more_is_no_better("budget")),
    Guideline(
        "G8",
        "For RAG, more items of the history are not better.",
        _REVIEW,
        "two levels of history",
        _more_is_no_better("history"),
    ),
    Guideline(
        "G9",
        "With little personal data compression costs less than with much, and may even help.",
        _PAPER,
        "compression and examples together",
        _compressed_better_at_few,
    ),
    Guideline("G10", "Compression costs quality.", _REVIEW, "compression", _compression_costs),
    Guideline(
        "S1",
        "With few examples RAG is better than LoRA.",
        _SALEMI,
        "rag and lora at two amounts of examples",
        _cold_start,
    ),
    Guideline("S2", "RAG with LoRA is better than either alone.", _SALEMI, "rag, lora and rag+lora", _both_best),
)
NOT_TESTED = {
    "G2": "with difficulty the choice shifts from LoRA to RAG with the strongest model: needs a graded difficulty",
    "G3": "RAG suits tasks of moderate difficulty: needs a graded difficulty",
    "G4": "harder tasks need stronger models: needs a graded difficulty and models of several sizes",
    "G11": "memory is the first filter: that is what `plan` does, not a question for an experiment",
    "G12": "small models limit what RAG gains: needs models of several sizes",
}
"""Guidelines of the same source that no claim here covers, and why."""
