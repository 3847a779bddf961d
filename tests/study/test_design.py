"""STUDY.toml, the plan that follows from it, and what it says about mistakes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedspine.cost import workload_of
from fedspine.errors import FedSpineError
from fedspine.structure import Structure
from fedspine.study.design import Study, canonical, load_study
from fedspine.study.estimate import CellPlan, cell_config, workload_for
from fedspine.study.run import plan_study
from tests.small_run import write_data, write_model
from tests.tiny import tiny_resident

DEVICE = """jitter = 0
bandwidth_sigma = 0
download_mbps = [20]
upload_mbps = [10]
[[types]]
name = "board"
count = 1
gflops = 1.0
memory_mb = {}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data of twelve writers with ten rows each, and a device."""
    folder = tmp_path_factory.mktemp("study")
    write_model(folder / "model")
    write_data(folder / "data")
    (folder / "board.toml").write_text(DEVICE.format(8))
    return folder


def small_study(folder: Path, **changes: Any) -> Study:
    """Of three writers, with a model of two layers."""
    values: dict[str, Any] = {
        "device": str(folder / "board.toml"),
        "seeds": 1,
        "users": 3,
        "test_examples": 10,
        "encoder": str(folder / "model"),
        "tasks": {"reviews": {"data": str(folder / "data"), "partition": "column:writer"}},
    }
    fixed = {"task": "reviews", "model": str(folder / "model"), "examples": 8, "max_length": 12, "batch_size": 4}
    fixed |= {"budget": 4, "local_iterations": 2, "probe_examples": 4, "rank": 4}
    return Study("small", **{**values, **changes, "fixed": fixed | changes.get("fixed", {})})


def reasons(study: Study) -> dict[str, str]:
    """Why a cell is infeasible, by its varied levels."""
    plans = plan_study(study)
    return {" ".join(str(p.cell.levels[f]) for f in study.vary): p.estimate.infeasible for p in plans}


def test_what_a_learner_ignores_makes_no_cells(folder: Path) -> None:
    study = small_study(folder, vary={"learner": ("rag", "lora"), "rank": (2, 4), "history": (1, 4)})
    assert len(study.points()) == 8
    assert [(c.levels["learner"], c.levels["rank"], c.levels["history"]) for c in study.cells()] == [
        ("rag", None, 1),
        ("rag", None, 4),
        ("lora", 2, None),
        ("lora", 4, None),
    ]


def test_around_the_anchor_one_factor_at_a_time_and_named_pairs(folder: Path) -> None:
    vary = {"learner": ("lora", "rag"), "examples": (2, 4, 8), "budget": (2, 4)}
    study = small_study(folder, design="around", vary=vary, interactions=(("learner", "examples"),))
    chosen = {tuple(point[factor] for factor in vary) for point in study.points()}
    assert study.points()[0]["examples"] == 8  # the level in [fixed], not the first
    assert chosen == {(who, count, 4) for who in ("lora", "rag") for count in (2, 4, 8)} | {("lora", 8, 2)}


def test_cells_keep_their_names_when_a_study_grows(folder: Path) -> None:
    few = small_study(folder, vary={"learner": ("rag", "lora")})
    more = small_study(folder, seeds=3, vary={"learner": ("none", "lora", "rag"), "examples": (4, 8)})
    assert {cell.name for cell in few.cells()} < {cell.name for cell in more.cells()}


@pytest.mark.parametrize(
    ("where", "line", "message"),
    [
        (
            "[vary]",
            'learner = ["lorra"]',
            "learner: 'lorra' must be one of none, rag, lora, rag+lora, ia3, prompt, prefix (did you mean",
        ),
        ("[vary]", 'compression = ["int3"]', "compression = 'int3': must be one of none, bf16, width:SHARE"),
        ("[fixed]", 'compression = "width:1.5"', "the share must be a number above 0 and at most 0.95"),
        ("[fixed]", 'budget = "3 days"', "the unit of budget: 'days' must be one of steps, samples, seconds"),
        ("[fixed]", "learning_rat = 1.0", "unknown factor 'learning_rat': did you mean 'learning_rate'?"),
        ("[fixed]", "learning_rate = -1.0", "learning_rate = -1.0: must be at least"),
        ("[fixed]", "target_sparsity = 0.5", "target_sparsity: a study sets it itself; use compression"),
        ("[fixed]", "examples = -1", "examples = -1: must be a whole number of at least 0"),
        ("[vary]", 'task = ["reviews"]', "task = 'reviews': must be one of persona-recall"),
        ("[vary]", "rank = 4", "[vary] rank = 4: must be a list of levels"),
        ("[vary]", "rank = [4, 4]", "must be a list of different levels"),
        ("", "seed = 3", "unknown key 'seed': did you mean 'seeds'?"),
        ("", "seeds = 0", "seeds = 0: must be a whole number of at least 1"),
        ("", 'metric = "rouge"', "metric: 'rouge' must be one of accuracy, mae"),
        ("[tasks.mine]", 'data = "x"\nuser = "y"', "[tasks.mine]: 'user' must be one of data, text_column"),
        ("", 'interactions = [["a", "b"]]', "must be factors of [vary]"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, where: str, line: str, message: str) -> None:
    path = tmp_path / "study.toml"
    parts = {"": "", "[fixed]": 'task = "persona-rule"', "[vary]": "", "[tasks.mine]": ""}
    parts[where] += f"\n{line}"
    path.write_text("\n".join(f"{head}\n{lines}" for head, lines in parts.items() if lines))
    with pytest.raises(FedSpineError) as error:
        load_study(path)
    assert message in str(error.value)


def test_what_cannot_run_says_why(folder: Path) -> None:
    found = reasons(small_study(folder, vary={"examples": (0, 8, 500), "learner": ("rag", "lora")}))
    assert found["0 rag"] == "examples = 0: retrieval from an empty history"
    assert found["8 rag"] == found["8 lora"] == ""
    assert "has 40 rows, 10 of them held out; use at most 30" in found["500 lora"]
    found = reasons(small_study(folder, vary={"scope": ("local", "federated"), "compression": ("fedspine:0.3",)}))
    assert "FedSpine cuts in a federation" in found["local fedspine:0.3"]
    assert found["federated fedspine:0.3"] == ""
    assert "one step takes" in reasons(small_study(folder, vary={"budget": ("0.001 seconds",)}))["0.001 seconds"]


def test_memory_decides_by_the_formula_with_its_margin(folder: Path, tmp_path: Path) -> None:
    study = small_study(folder, vary={"compression": ("none", "bf16", "width:0.5")})
    full, half, cut = (plan.estimate.memory_bytes for plan in plan_study(study))
    assert half < full
    assert cut < full
    (tmp_path / "small.toml").write_text(DEVICE.format(1.25 * full / 1e6 - 1e-6))
    found = reasons(small_study(folder, device=str(tmp_path / "small.toml"), vary=study.vary))
    assert "(margin included)" in found["none"]
    assert found["bf16"] == found["width:0.5"] == ""


def test_costs_are_those_of_the_cost_formulas(folder: Path) -> None:
    """bfloat16 takes two bytes where float32 takes four, adapters aside; inference is a part of training."""
    study = small_study(folder, vary={"compression": ("none", "bf16"), "budget": (2, 4)})
    plans: list[CellPlan] = plan_study(study)
    assert [plan.estimate.steps for plan in plans] == [2, 4, 2, 4]
    assert plans[1].estimate.seconds == pytest.approx(2 * plans[0].estimate.seconds)
    shape = tiny_resident().shape
    config = cell_config(study, plans[0].cell)
    plain, halved = (workload_for(plan.cell, config, shape) for plan in plans[1:3])
    assert plain == workload_of(config, shape)
    counts = Structure.full(shape).counts()
    without = plain.planned_memory_bytes(0.0, 4) - plain.adapter_bytes(0.0, 4) - 3 * plain.upload_bytes(0.0, 4)
    assert plain.planned_memory_bytes(0.0, 4) - halved.planned_memory_bytes(0.0, 4) == pytest.approx(without / 2)
    assert plain.inference_bytes(0.0, 4) < plain.planned_memory_bytes(0.0, 4)
    assert plain.iteration_flops(counts, 0) == 2 * plain.inference_flops(counts, 0)


def test_a_budget_counts_steps_samples_or_seconds_of_the_device(folder: Path) -> None:
    study = small_study(folder, vary={"budget": (10, "40 samples")})
    steps, samples = plan_study(study)
    assert (steps.estimate.steps, samples.estimate.steps) == (10, 10)
    seconds = small_study(folder, vary={"budget": (f"{steps.estimate.seconds * 1.001} seconds",)})
    assert plan_study(seconds)[0].estimate.steps == 10


def test_bad_surroundings_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "device.toml").write_text(DEVICE.replace("memory_mb = {}\n", ""))
    monkeypatch.setitem(sys.modules, "bm25s", None)
    no_user = {"reviews": {"data": str(folder / "data"), "partition": "column:user"}}
    for changes, message in (
        ({"device": str(tmp_path / "device.toml")}, "memory_mb is missing"),
        ({"device": "jetson-80"}, "it holds 3 types"),
        ({"tasks": no_user}, "partition = 'column:user': no such column in the data"),
        ({"metric": "mae"}, "metric = 'mae' needs classes that are numbers, and task 'reviews' has bad, good"),
        ({"fixed": {"learner": "rag", "retriever": "bm25"}}, "pip install 'fedspine[rag]'"),
    ):
        with pytest.raises(FedSpineError) as error:
            plan_study(small_study(folder, **changes))  # type: ignore[arg-type]
        assert message in str(error.value)


def test_the_example_in_the_documentation_is_a_study(tmp_path: Path) -> None:
    import fedspine.study.design as design

    lines = (design.__doc__ or "").splitlines()
    example = "\n".join(line[4:] for line in lines if line.startswith("    "))
    (tmp_path / "study.toml").write_text(example)
    study = load_study(tmp_path / "study.toml")
    assert len(study.points()) == 8
    assert canonical(study.points()[0])["rank"] is None
