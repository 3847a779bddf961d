"""The README.md of an exported model: what it is, how to load it, how good, how large and how fast it is."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine.config import RunConfig
from fedspine.model import EMBEDDED, EMBEDDED_HUB_NAME
from fedspine.report.summary import iterations_text
from fedspine.structure import ModelShape, Structure

_AUTO = {"classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}
_PIPELINE = {"classification": "text-classification", "causal-lm": "text-generation"}
_LANGUAGE_FIGURES = {
    "device_perplexity_mean": "perplexity of the devices' own models, mean",
    "perplexity_cut_untuned": "perplexity of the model cut like the global one and not tuned",
    "answers_rouge_l": "ROUGE-L of the global model's answers",
    "answers_exact_match": "share of its answers that are exactly right",
}
"""Of a run's summary."""
_MANY = 12
"""Classes that are named one by one."""


@dataclass(frozen=True)
class Measured:
    """What was measured of an exported model."""

    accuracy: float
    loss: float
    examples: int
    """Rows of the evaluation set."""
    parameters: int
    base_parameters: int
    """Of the uncut base with the same head."""
    file_bytes: int
    """Of the safetensors files."""
    milliseconds: float
    """Median of a forward pass of one text."""
    base_milliseconds: float
    speedup: float
    """Median of base over own time, pass by pass."""
    tokens: int
    """Of that text."""
    repeats: int
    threads: int
    cpus: int
    torch_version: str


@dataclass(frozen=True)
class Exported:
    """What a card is made of."""

    config: RunConfig
    summary: Mapping[str, Any]
    """Of the run; empty before it has finished."""
    round: int
    classes: tuple[str, ...]
    prompt: str
    """How a language model is asked: an example."""
    chat: bool
    """Whether special tokens are in the prompt already."""
    shape: ModelShape
    structure: Structure
    device: int | None
    merged: bool
    stock: bool
    onnx: bool
    folder: str
    measured: Measured


def card(exported: Exported) -> str:
    """Markdown with the front matter of the Hugging Face hub."""
    sections = (
        _front_matter(exported),
        _what(exported),
        _loading(exported),
        _task(exported),
        _quality(exported),
        _size(exported),
        _kept(exported),
        _training(exported),
        _limits(exported),
    )
    return "\n\n".join(sections) + "\n"


def shown_name(value: str) -> str:
    """A model or data set without the folders of this machine; a hub name stays whole."""
    return Path(value).name if os.path.isabs(value) or os.path.exists(value) or value.startswith(("~", ".")) else value


def _front_matter(exported: Exported) -> str:
    config = exported.config
    base = EMBEDDED_HUB_NAME if config.model == EMBEDDED else config.model
    lines = ["---"]
    if shown_name(base) == base:  # a folder has no name that others could follow
        lines.append(f"base_model: {json.dumps(base)}")
    lines += [
        "library_name: transformers",
        f"pipeline_tag: {_PIPELINE[config.task]}",
        "tags:",
        *(f"- {tag}" for tag in ("fedspine", "federated-learning", "structured-pruning", "lora")),
        "---",
    ]
    return "\n".join(lines)


def _what(exported: Exported) -> str:
    config, name = exported.config, shown_name(exported.config.model)
    sparsity = exported.structure.sparsity(exported.shape)
    use = "a text classifier" if config.task == "classification" else "a language model"
    cut = "uncut" if sparsity == 0 else f"with {sparsity:.0%} of its attention heads and FFN channels cut away"
    whose = (
        "the global model of the run, cut to the structure that the devices agree on"
        if exported.device is None
        else f"the own model of device {exported.device}, cut to the structure that this device ended with"
    )
    devices = f"{config.devices} {'simulated ' if _simulated(exported) else ''}devices"
    return (
        f"# {name}, tuned by {config.devices} devices\n\n"
        f"This is `{name}` as {use}, {cut}, and tuned with LoRA by a federation of {devices}, each with texts of its "
        f"own. It is {whose}. Made with [FedSpine](https://arxiv.org/abs/2501.02438)."
    )


def _simulated(exported: Exported) -> bool:
    return bool(exported.summary.get("engine") != "deployment")


def _loading(exported: Exported) -> str:
    kind, folder = _AUTO[exported.config.task], json.dumps(exported.folder)
    lines = ["## How to load", "", "```python"]
    if exported.stock:
        lines += [f"from transformers import AutoTokenizer, {kind}"]
        model = f"{kind}.from_pretrained({folder})"
    else:
        lines += ["import fedspine", "from transformers import AutoTokenizer"]
        model = f"fedspine.load_model({folder})"
    if not exported.merged:
        lines += ["from peft import PeftModel"]
    lines += ["", f"tokenizer = AutoTokenizer.from_pretrained({folder})", f"model = {model}"]
    if not exported.merged:
        adapter = json.dumps(f"{exported.folder}/adapter")
        lines += [f"model = PeftModel.from_pretrained(model, {adapter}).eval()"]
    if exported.config.task == "classification":
        lines += [
            'logits = model(**tokenizer("a text", return_tensors="pt")).logits',
            "print(model.config.id2label[int(logits.argmax())])",
        ]
    else:
        special = "add_special_tokens=False, " if exported.chat else ""
        lines += [
            f"prompt = {json.dumps(exported.prompt, ensure_ascii=False)}",
            f'inputs = tokenizer(prompt, return_token_type_ids=False, {special}return_tensors="pt")',
            "tokens = model.generate(**inputs, max_new_tokens=40)",
            "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        ]
    lines += ["```", "", _why(exported)]
    if exported.onnx:
        lines += ["", _about_onnx(exported)]
    return "\n".join(lines)


def _why(exported: Exported) -> str:
    if exported.stock:
        text = "config.json says how many heads and channels are left, so that transformers needs no help."
    else:
        text = (
            "What every layer keeps is in fedspine.json, because the configuration of this family "
            f"(`{exported.shape.family}`) cannot say it. transformers alone would build the uncut model and refuse the "
            "weights."
        )
    if not exported.merged:
        text += (
            " The adapters are apart from the weights, in `adapter/`; without them the model is cut and not tuned, and "
            "`model.merge_and_unload()` folds them in, which makes it faster."
        )
    return text


def _about_onnx(exported: Exported) -> str:
    cache = ", without a cache of keys and values" if exported.config.task == "causal-lm" else ""
    return (
        "`model.onnx` is the same model for ONNX Runtime, with the adapters folded in: int64 inputs [rows, length], "
        f"any number of rows and tokens, output `logits`{cache}. Its logits were compared with those of torch."
    )


def _task(exported: Exported) -> str:
    config = exported.config
    rows = {"task": config.task, "data": f"`{shown_name(config.data)}`"}
    if config.data == "embedded":
        rows["data"] = "`embedded`: requests to a house, written by FedSpine's own grammar"
    if config.task == "classification":
        named = ", ".join(f"`{name}`" for name in exported.classes[:_MANY])
        more = len(exported.classes) - _MANY
        rows["classes"] = f"{len(exported.classes)}: {named}{f' and {more} more' if more > 0 else ''}"
    rows["who had which rows"] = f"{config.devices} devices, partition `{config.partition}`"
    if config.partition in ("auto", "dirichlet") and config.data != "embedded":
        rows["who had which rows"] += f", Dirichlet alpha {config.dirichlet_alpha:g} where it is used"
    rows["longest text"] = f"{config.max_length} tokens; longer ones were cut"
    return "## Task and data\n\n" + _table(("", ""), rows.items())


def _quality(exported: Exported) -> str:
    measured, summary = exported.measured, exported.summary
    language = exported.config.task == "causal-lm"
    name = "token accuracy" if language else "accuracy"
    value = f"{measured.accuracy:.4f}, loss {measured.loss:.4f}"
    if language and measured.loss < 700:
        value += f", perplexity {math.exp(measured.loss):.2f}"
    rows = {f"**this model**, on all {measured.examples} evaluation rows, measured at the export": value}
    if summary:
        rows |= {
            f"own models of {summary['devices_evaluated']} devices, mean (standard deviation)": (
                f"{summary['device_accuracy_mean']:.4f} ({summary['device_accuracy_sd']:.4f})"
            ),
            "the worst of these devices": f"{summary['device_accuracy_min']:.4f}",
        }
        if summary.get("smoothed_accuracy") is not None:
            rows["global model during the run, with the averaged adapters"] = f"{summary['smoothed_accuracy']:.4f}"
        for key, what in _LANGUAGE_FIGURES.items():
            if key in summary:
                rows[what] = f"{summary[key]:.4g}"
    return "## Accuracy\n\n" + _table(("", name), rows.items())


def _size(exported: Exported) -> str:
    measured, shape = exported.measured, exported.shape
    sparsity = exported.structure.sparsity(shape)
    whole = sparsity * shape.prunable_parameters / shape.total_parameters
    rows = [
        ("parameters", f"{measured.parameters:,}", f"{measured.base_parameters:,}"),
        ("weights in float32", _megabytes(measured.file_bytes), _megabytes(4 * measured.base_parameters)),
        ("one text, median", f"{measured.milliseconds:.1f} ms", f"{measured.base_milliseconds:.1f} ms"),
    ]
    return (
        "## Size and speed\n\n"
        + _table(("", "this model", "uncut base"), rows)
        + f"\n\nCut away are {sparsity:.1%} of the prunable parameters ({shape.prunable_parameters:,} in heads and FFN "
        f"channels), which is {whole:.1%} of the whole model ({shape.total_parameters:,} with embeddings, norms and "
        f"head). The time is that of a forward pass of one text of {measured.tokens} tokens, {measured.repeats} of "
        f"each model in alternation; pass by pass this model was {measured.speedup:.2f} times as fast as the base. "
        f"torch {measured.torch_version} with {measured.threads} thread(s), on a machine with {measured.cpus} CPUs."
    )


def _kept(exported: Exported) -> str:
    shape, counts = exported.shape, exported.structure.counts()
    unit = "heads" if shape.queries == 1 else f"groups of {shape.queries} query heads and one key-value head"
    if len(set(counts)) == 1:
        heads, channels = counts[0]
        text = f"Every one of the {shape.layers} layers keeps {heads} of {shape.heads} {unit} and {channels} of "
        text += f"{shape.channels} FFN channels"
        if exported.structure.sparsity(shape) > 0:
            text += "; which ones differs from layer to layer"
        return f"## What is left\n\n{text}."
    rows = [(str(layer), str(heads), str(channels)) for layer, (heads, channels) in enumerate(counts)]
    head = ("layer", f"{unit}, of {shape.heads}", f"FFN channels, of {shape.channels}")
    return "## What is left\n\n" + _table(head, rows)


def _training(exported: Exported) -> str:
    config = exported.config
    rounds = f"{config.rounds} rounds"
    if exported.round < config.rounds:
        rounds = f"{exported.round} of {rounds}"
    return (
        "## How it was made\n\n"
        f"Method `{config.method}`: {rounds} with {config.sampled} of {config.devices} devices each, "
        f"{iterations_text(config)} local iterations of {config.batch_size} examples, AdamW with learning rate "
        f"{config.learning_rate:g}. LoRA on {', '.join(config.lora_targets)}, alpha / rank {config.lora_scale:g}; "
        f"devices train ranks {config.min_rank} to {config.max_rank}, and the adapters here are the server's moving "
        f"average over rounds, of rank {config.max_rank}. Seed {config.seed}. The run again:\n\n"
        f"```bash\n{command(config)}\n```"
    )


def command(config: RunConfig) -> str:
    """The command line of a run: every key that is not as its method has it by default. Folders are shortened."""
    usual = RunConfig.from_values({"method": config.method})
    words = ["fedspine simulate"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if (field.name == "method" and value != field.default) or value != getattr(usual, field.name):
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            if field.name in ("model", "data", "population"):
                text = ",".join(shown_name(part) for part in text.split(","))
            words.append(f"-s {shlex.quote(f'{field.name}={text}')}")
    return " \\\n  ".join(words)


def _limits(exported: Exported) -> str:
    config = exported.config
    texts = [
        f"The figures above come from one run with one seed, and from the {exported.measured.examples} rows of one "
        "evaluation set: another seed, other devices or other texts give others.",
    ]
    if _simulated(exported):
        texts.append("The devices were simulated: what really ran was the training, not their hardware.")
    if config.data == "embedded":
        texts.append("The texts were made by a small grammar: the model is a demonstration and knows no real requests.")
    if exported.round < config.rounds or not exported.summary:
        texts.append(f"The run had not finished at the export: {exported.round} of {config.rounds} rounds.")
    if exported.structure.sparsity(exported.shape) > 0:
        texts.append(
            "What to cut was judged by this task alone, so the model has most likely lost more of what else its base "
            "could do than of this task."
        )
    texts.append(
        "Federated training keeps texts on the devices, but adapters can still tell about them: there is no "
        "differential privacy here. Whatever bias the base model has, this one can have too."
    )
    return "## Limits\n\n" + " ".join(texts)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
