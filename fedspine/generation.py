"""What a tuned language model is worth: perplexities, and its answers to the instructions of the evaluation set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedspine.data.language import prompt_ids
from fedspine.data.prepared import PreparedData
from fedspine.errors import ConfigError, DataError
from fedspine.federation import Evaluation, ServerState
from fedspine.lora.resident import ResidentModel
from fedspine.model import load_tokenizer
from fedspine.structure import Structure
from fedspine.types import Arrays, RoundRecord
from fedspine.workbench import Workbench


def check_metrics(data: PreparedData) -> None:
    """Errors: `DataError` without instructions, `ConfigError` without the library that measures answers."""
    if data.test.pairs is None:
        raise DataError("generate_examples: there are no instructions with responses in the data; set it to 0")
    try:
        import torchmetrics.functional.text  # noqa: F401
    except ImportError:
        raise ConfigError(
            "generate_examples: ROUGE-L needs torchmetrics; install it with `pip install 'fedspine[text]'`, or set it "
            "to 0"
        ) from None


def language_figures(
    bench: Workbench,
    evaluate: Callable[[Structure, Arrays], Evaluation],
    start: Arrays,
    state: ServerState,
    records: Sequence[RoundRecord],
    device_losses: Sequence[float],
) -> dict[str, float]:
    """For the summary: perplexity, of the cut model without any tuning too, and how good the smoothed model answers.

    `start`: adapters that change nothing.
    """
    figures = {
        "final_perplexity": perplexity(next(r.loss for r in reversed(records) if r.loss is not None)),
        "device_perplexity_mean": statistics.fmean(map(perplexity, device_losses)),
        "perplexity_cut_untuned": perplexity(evaluate(state.consensus, start).loss),
        "smoothed_perplexity": perplexity(evaluate(state.consensus, state.averaged).loss),
    }
    config, test = bench.config, bench.data.test
    if config.generate_examples and test.pairs is not None:  # by the model that was evaluated last
        rows = np.arange(min(config.generate_examples, len(test)))
        tokenizer = load_tokenizer(config)
        prompts = prompt_ids(tokenizer, test.texts.take(rows))
        answers = generate(bench.resident, tokenizer, prompts, config.generate_tokens)
        figures |= measure(answers, test.pairs.take(rows))
    return figures


def perplexity(loss: float) -> float:
    """Of a mean loss per token; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def generate(resident: ResidentModel, tokenizer: Any, prompts: Sequence[list[int]], most_tokens: int) -> list[str]:
    """Greedy answers of the mounted model to prompts of token ids, one at a time, with a cache of keys and values."""
    model: Any = resident.model
    found = []
    for ids in prompts:
        given = torch.tensor([ids], device=resident.device)
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=most_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        found.append(tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True))
    return found


def measure(answers: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Against the responses of the data: share that is equal but for white space at the ends, and mean ROUGE-L (F)."""
    from torchmetrics.functional.text import rouge_score

    exact = sum(answer.strip() == response.strip() for answer, response in zip(answers, responses, strict=True))
    rouge = rouge_score(list(answers), list(responses), rouge_keys="rougeL")
    return {
        "answers": len(answers),
        "answers_exact_match": exact / len(answers),
        "answers_rouge_l": float(rouge["rougeL_fmeasure"]),
    }
