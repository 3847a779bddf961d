"""How much faster a cut model answers in ONNX Runtime, where neither Python nor torch takes a part of the time.

    fedspine export runs/reviews --merge --onnx --out cut
    fedspine export runs/unpruned --merge --onnx --out dense
    .venv/bin/python benchmarks/onnx_latency.py cut dense [--batch 1 16] [--length 64] [--repeats 200]

Both graphs are run in alternation in one process, on one thread, with random tokens; medians, and their ratio.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs=2, type=Path, metavar="DIR", help="exported with --onnx; the second is 100 %%")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    for folder in options.models:
        if not (folder / "model.onnx").is_file():
            parser.error(f"{folder}: no model.onnx there; write it with fedspine export --onnx")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(folder / "model.onnx", settings) for folder in options.models]
    print(f"{options.length} tokens, one thread, {options.repeats} repeats, medians")
    for batch in options.batch:
        seconds = np.array(
            [[_seconds(each, batch, options.length) for each in sessions] for _ in range(options.repeats)]
        )
        ours, theirs = np.median(seconds[options.repeats // 10 :], axis=0)
        print(f"batch {batch}: {1e3 * ours:.2f} of {1e3 * theirs:.2f} ms, ratio {ours / theirs:.3f}")


def _seconds(session: onnxruntime.InferenceSession, batch: int, length: int) -> float:
    """Of one run."""
    names = [each.name for each in session.get_inputs()]
    ids = np.random.default_rng(0).integers(1000, 20_000, (batch, length))
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds = {name: values[name] for name in names}
    began = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
