"""What `recommend` answers when nothing is known but the device, the task and the rules."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

import fedspine.study.recommend
from fedspine.study.difficulty import Difficulty
from fedspine.study.estimate import MARGIN
from fedspine.study.ranking import Option
from fedspine.study.recommend import Recommendation, recommend
from tests.study.test_design import DEVICE
from tests.study.test_recommend import EASY, HARD, MODERATE
from tests.tiny import tiny_config

SIZES = {"small": (256, 4), "large": (2048, 12)}
"""Hidden, layers: of 20 MB, and of 2.5 GB."""


class Cold:
    """Recommendations without evidence and probe, of a task of a given difficulty."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        for name, (hidden, layers) in SIZES.items():
            sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
            config = tiny_config("bert", vocab_size=8 * hidden, num_hidden_layers=layers, **sizes)
            config.save_pretrained(folder / name)

    def __call__(
        self, examples: int, hard: Difficulty, memory_mb: float, models: str = "small large", **more: Any
    ) -> Recommendation:
        """The answer, which is the same again, and in any order of the models."""
        (self.folder / "board.toml").write_text(DEVICE.format(memory_mb))
        self.patch.setattr(fedspine.study.recommend, "_difficulty", lambda *_: hard)
        self.patch.chdir(self.folder)
        names = models.split()
        ask = {"encoder": "small", "hours": 1000.0, **more}
        found = recommend("board.toml", "persona-rule", examples, models=names, **ask)
        again = recommend("board.toml", "persona-rule", examples, models=names[::-1], **ask)
        assert [option.levels for option in found.options] == [option.levels for option in again.options]
        assert all(option.reasons for option in found.options[:1])
        for first, second in itertools.pairwise(found.options):
            assert first.strength >= second.strength
            if first.strength == second.strength:  # ties go to the cheapest
                assert first.plan.estimate.seconds <= second.plan.estimate.seconds
        return found


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cold:
    return Cold(tmp_path, monkeypatch)


def megabytes(found: Recommendation, **levels: Any) -> float:
    """With its margin, of the first option with these levels."""
    option = next(each for each in found.options if levels.items() <= each.levels.items())
    return MARGIN * option.plan.estimate.memory_bytes / 1e6


def because(option: Option) -> set[str]:
    """The rules that speak for an option."""
    return {reason.partition(":")[0] for reason in option.reasons}


def test_nothing_fits(cold: Cold) -> None:
    found = cold(100, MODERATE, 1.0)
    assert found.options == ()
    assert all("and board.toml has 1 MB" in plan.estimate.infeasible for plan in found.infeasible)
    assert found.nearest.startswith("lora, small, compression bf16, rank 8, 60 steps: needs ")
    assert any(note.startswith("first would be rag+lora, large, compression none") for note in found.notes)


def test_cold_start(cold: Cold) -> None:
    found = cold(3, MODERATE, 9000)
    assert found.options[0].levels["learner"] == "rag"
    assert because(found.options[0]) == {"cold start", "G2"}
    assert any(
        note.startswith("with about 30 examples of a task as hard, first would be rag+lora") for note in found.notes
    )


def test_easy_task(cold: Cold) -> None:
    found = cold(100, EASY, 9000)
    levels = found.options[0].levels
    assert (levels["learner"], levels["model"], levels["compression"]) == ("rag+lora", "small", "none")
    assert because(found.options[0]) == {"both", "history answers", "G6", "G7", "G10"}
    assert "with about 3 examples of a task as hard, first would be rag" in found.notes


def test_hard_task_with_a_strong_quantised_model_that_fits(cold: Cold) -> None:
    roomy = cold(100, HARD, 9000)
    needs = {level: megabytes(roomy, model="large", compression=level) for level in ("none", "bf16", "int8", "nf4")}
    assert needs["nf4"] < needs["int8"] < needs["bf16"] < needs["none"]
    assert (roomy.options[0].levels["model"], roomy.options[0].levels["compression"]) == ("large", "none")
    tight = cold(100, HARD, needs["int8"] + 1)
    best = tight.options[0]
    assert (best.levels["model"], best.levels["compression"]) == ("large", "nf4")  # int8 ties and takes more memory
    assert {"G3b", "G4", "large"} <= because(best)
    assert any("(2505.15030, strength 1)" in reason for reason in best.reasons)
    assert any(
        note.startswith("first would be rag+lora, large, compression none, rank 8, 60 steps, if it could run: needs ")
        for note in tight.notes
    )
    assert any("int8 taken to be as slow" in note for note in tight.notes)
    cut = cold(100, HARD, needs["nf4"] + 1, compressions=("width:0.8",))
    assert megabytes(cut, model="large", compression="width:0.8") < needs["nf4"]
    assert cut.options[0].levels["compression"] == "nf4"  # and not what is left of a large model
    assert cold(100, HARD, needs["nf4"] - 100).options[0].levels["model"] == "small"


def test_four_bits_that_save_no_memory(cold: Cold) -> None:
    found = cold(100, HARD, 9000, models="small")
    needs = {level: megabytes(found, learner="lora", rank=8, compression=level) for level in ("nf4", "bf16", "none")}
    assert needs["nf4"] > needs["none"] > needs["bf16"]
    (note,) = (note for note in found.notes if note.startswith("no memory is saved by int8 or nf4 on small"))
    assert note.endswith(", ".join(f"{level} {needs[level]:.0f} MB" for level in ("nf4", "bf16", "none")))
    assert found.options[0].levels["compression"] == "none"
    places = {str(each.levels): place for place, each in enumerate(found.options)}
    for each in found.options:
        if each.levels.get("compression") == "nf4":  # as many votes as bf16, and slower
            assert places[str(each.levels)] > places[str({**each.levels, "compression": "bf16"})]
    assert not any("on large" in note for note in cold(100, HARD, 9000, models="large").notes)


def test_levels_that_the_user_names_are_candidates_too(cold: Cold) -> None:
    ready = f"ready:{cold.folder / 'small'}"
    found = cold(100, HARD, 9000, models="large", compressions=("depth:0.25", ready))
    levels = {option.levels.get("compression") for option in found.options}
    assert levels == {None, "none", "bf16", "width:0.5", "int8", "nf4", "depth:0.25", ready}
    assert all("model" not in option.levels for option in found.options if option.levels.get("compression") == ready)
    assert megabytes(found, learner="lora", compression=ready) < 0.1 * megabytes(found, compression="depth:0.25")


def test_without_the_extra_a_probe_leaves_out_what_needs_it(cold: Cold, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = megabytes(cold(100, HARD, 9000), model="large", compression="int8") + 1
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = "compression = 'int8' needs bitsandbytes: pip install 'fedspine[quant]'"
    found = cold(100, HARD, tight)
    assert found.options[0].levels["compression"] == "nf4"  # what suits the device does not depend on this machine
    assert missing in found.notes
    monkeypatch.setattr("fedspine.study.probe.probed", lambda study, options, *_: list(options))
    found = cold(100, HARD, tight, probe_minutes=1.0)
    assert not {"int8", "nf4"} & {option.levels.get("compression") for option in found.options}
    assert missing in found.notes
