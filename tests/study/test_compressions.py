"""What is left of a model: fewer layers, quantised weights, or what an exported folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedspine
from fedspine.artifact import save_model
from fedspine.config import RunConfig
from fedspine.errors import FedSpineError
from fedspine.lora.adapters import narrow
from fedspine.lora.resident import ResidentModel
from fedspine.model import load_base, load_tokenizer, model_shape
from fedspine.pruning.depth import kept_layers, with_layers
from fedspine.pruning.families import FAMILIES, family_of
from fedspine.study.base import loadable, start_structure
from fedspine.study.design import Study, canonical, compression
from fedspine.study.estimate import CellPlan
from fedspine.study.run import plan_study, results, run_study
from fedspine.study.workload import QUANTISER_BYTES
from tests.small_run import write_data, write_model
from tests.study.test_design import DEVICE, reasons, small_study
from tests.study.test_run import write_study
from tests.tiny import random_arrays, tiny_config, uneven_structure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a device of 100 MB and a model of four layers; and that model cut unevenly, as an export writes it."""
    folder = tmp_path_factory.mktemp("compressions")
    write_data(folder / "data")
    (folder / "board.toml").write_text(DEVICE.format(100))
    config = RunConfig(model=str(write_model(folder / "model", num_hidden_layers=4)), max_length=12)
    model, family = load_base(config, 2)
    resident = ResidentModel(model, family, config.lora_targets, 6, 2.0)
    structure = uneven_structure(resident.shape)
    arrays = narrow(random_arrays(resident), structure, 6, resident.shape)
    resident.mount(structure, arrays, merge=True)
    save_model(folder / "cut", resident.weights(), model.config, "classification", structure.counts(), "model")
    load_tokenizer(config).save_pretrained(folder / "cut")
    return folder


def planned(study: Study) -> CellPlan:
    (plan,) = plan_study(study)
    return plan


def test_layers_are_dropped_evenly_and_the_ends_stay() -> None:
    assert kept_layers(12, 0.5) == [0, 2, 4, 7, 9, 11]
    assert kept_layers(6, 0.01) == [0, 1, 2, 4, 5]  # never none
    assert kept_layers(3, 0.4) == [0, 2]
    for layers in range(3, 40):
        for drop in range(1, layers - 1):
            kept = kept_layers(layers, drop / layers)
            assert kept == sorted(set(kept))
            assert (len(kept), kept[0], kept[-1]) == (layers - drop, 0, layers - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallow_model_is_the_model_without_its_layers(folder: Path, tmp_path: Path, family: str) -> None:
    types = {"layer_types": [*["sliding_attention", "full_attention"] * 2, "full_attention"]}
    settings: dict[str, Any] = types if "gemma" in family and family != "gemma" else {}
    model = str(write_model(tmp_path / "model", family=family, num_hidden_layers=5, **settings))
    fixed = {"model": model, "compression": "depth:0.6"}
    plan = planned(small_study(folder, fixed=fixed))
    whole, _ = load_base(plan.config, 2, 0)
    layers: Any = whole.get_submodule(family_of(family).layers)
    for position in (3, 2, 1):
        del layers[position]
    whole.config = with_layers(whole.config, [0, 4])
    for part in whole.modules():
        if hasattr(part, "config"):
            part.config = whole.config
    inputs = {"input_ids": torch.tensor([[2, 9, 10, 11, 3, 0]]), "attention_mask": torch.tensor([[1] * 5 + [0]])}
    with loadable(plan, 2) as found, torch.inference_mode():
        shallow, _ = load_base(found.config, 2, 0)
        torch.testing.assert_close(shallow(**inputs).logits, whole(**inputs).logits)
        assert model_shape(found.config, 2) == model_shape(plan.config, 2, 0.6)
    assert not Path(found.config.model).exists()


def test_fewer_layers_cost_less_and_federate(folder: Path, tmp_path: Path) -> None:
    vary = {"compression": ("none", "depth:0.5"), "scope": ("local", "federated")}
    plans = plan_study(small_study(folder, vary=vary))
    assert plans[2].estimate.seconds < plans[0].estimate.seconds
    assert plans[2].estimate.memory_bytes < 0.7 * plans[0].estimate.memory_bytes
    assert plans[3].estimate.upload_bytes < 0.6 * plans[1].estimate.upload_bytes
    for name in ("model", "data", "board.toml"):
        (tmp_path / name).symlink_to(folder / name)
    path = write_study(tmp_path, 'compression = ["depth:0.5"]\nscope = ["federated-then-local"]\nbudget = [8]')
    path.write_text(path.read_text().replace("seeds = 2", "seeds = 1"))
    (result,) = results(run_study(path, tmp_path / "out"))
    assert result["trace"][-1]["upload_bytes"] == pytest.approx(result["estimate"]["upload_bytes"])
    assert result["trace"][-1]["device_seconds"] == pytest.approx(result["estimate"]["seconds"], rel=0.02)


def test_an_exported_model_is_where_a_cell_starts(folder: Path) -> None:
    study = small_study(folder, fixed={"compression": f"ready:{folder / 'cut'}"})
    plan = planned(study)
    exported = fedspine.load_model(folder / "cut")
    inputs = {"input_ids": torch.tensor([[2, 9, 10, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with loadable(plan, 2) as found, torch.inference_mode():
        model, family = load_base(found.config, 2)
        resident = ResidentModel(model, family, RunConfig.lora_targets, 1, 2.0)
        structure = start_structure(plan.cell.levels, resident.shape)
        assert structure.counts() == uneven_structure(resident.shape).counts()
        arrays = random_arrays(resident, 1)
        for name in [name for name in arrays if name.endswith(".B")]:
            arrays[name] = np.zeros_like(arrays[name])
        resident.mount(structure, narrow(arrays, structure, 1, resident.shape))
        torch.testing.assert_close(resident.model(**inputs).logits, exported(**inputs).logits)
    with loadable(plan, 3) as found:  # a task of another number of classes gets a head of its own
        assert load_base(found.config, 3)[0].get_parameter("classifier.weight").shape[0] == 3


def test_a_ready_model_takes_the_place_of_the_model_and_of_its_memory(folder: Path) -> None:
    levels = ("none", f"ready:{folder / 'model'}", f"ready:{folder / 'cut'}")
    study = small_study(folder, vary={"compression": levels, "model": (str(folder / "model"), "another")})
    assert [canonical(point)["model"] for point in study.points()][2:] == [None] * 4
    plans = plan_study(small_study(folder, vary={"compression": levels}))
    whole, same, cut = (plan.estimate for plan in plans)
    assert whole == same
    assert cut.memory_bytes < whole.memory_bytes
    assert cut.seconds < whole.seconds
    vary = {"compression": levels[1:], "scope": ("federated",), "learner": ("lora", "prefix")}
    found = list(reasons(small_study(folder, vary=vary)).values())
    assert found[0] == ""
    assert "a model that was cut before is tuned on its own device" in found[2]


def test_cells_of_ready_models_run(folder: Path, tmp_path: Path) -> None:
    for name in ("model", "data", "board.toml"):
        (tmp_path / name).symlink_to(folder / name)
    path = write_study(
        tmp_path,
        f'compression = ["ready:{(folder / "cut").as_posix()}", "ready:{(folder / "model").as_posix()}", "none"]\n'
        'learner = ["none", "lora", "ia3"]\nbudget = [4]',
    )
    path.write_text(path.read_text().replace("seeds = 2", "seeds = 1"))
    found = list(results(run_study(path, tmp_path / "out")))
    assert len(found) == 9
    scores: dict[Any, Any] = {}
    for result in found:
        level = str(result["levels"]["compression"]).rpartition("/")[2]
        scores[result["levels"]["learner"], level] = result["scores"], result["trace"]
    for learner in ("none", "lora", "ia3"):
        assert scores[learner, "model"] == scores[learner, "none"]
        assert scores[learner, "cut"][1][-1]["device_seconds"] <= scores[learner, "none"][1][-1]["device_seconds"]


def test_four_bits_save_on_a_large_model_and_cost_on_a_small_one(folder: Path, tmp_path: Path) -> None:
    def bytes_of(model: Path) -> list[float]:
        vary = {"compression": ("none", "int8", "nf4")}
        study = small_study(folder, vary=vary, fixed={"model": str(model), "max_length": 8})
        return [plan.estimate.memory_bytes for plan in plan_study(study)]

    pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    tiny_config("bert", max_position_embeddings=64, **sizes).save_pretrained(tmp_path / "large")
    small, large = bytes_of(folder / "model"), bytes_of(tmp_path / "large")
    assert min(small[1:]) > small[0] + QUANTISER_BYTES / 2
    assert large[2] < large[1] < 0.5 * large[0]


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("depth:1.5", "compression = 'depth:1.5': the share must be a number above 0 and at most 0.95"),
        (
            "depth:0.9",
            "depth pruning by 0.9 of 4 layers: the first and the last must stay; use a share of at most",
        ),
        ("int8:4", "compression = 'int8:4': must be one of none, bf16, width:SHARE, depth:SHARE"),
        ("ready:", "compression = 'ready:': must be one of none"),
        ("ready:nowhere", "compression = 'ready:nowhere': there is no such folder; name one that `fedspine export`"),
    ],
)
def test_bad_levels_are_named(folder: Path, level: str, message: str) -> None:
    with pytest.raises(FedSpineError) as error:
        plan_study(small_study(folder, vary={"compression": (level,)}))
    assert message in str(error.value)


def test_levels_are_read() -> None:
    assert compression("nf4") == ("nf4", 0.0)
    assert compression("depth:0.25") == ("depth", 0.25)
    assert compression("ready:models/a:b") == ("ready", 0.0)
