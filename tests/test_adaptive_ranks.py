"""APT's ranks: what is measured on a device, how the budget is spent, and a run whose adapters grow."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedspine.client_round import train
from fedspine.config import RunConfig
from fedspine.controller.rank_budget import allotted, awakened, for_rank, grow, mean_salience
from fedspine.errors import ConfigError
from fedspine.lora.adapters import narrow, nbytes, ranks_of
from fedspine.lora.rank_salience import DECAY, RankSalience
from fedspine.report.records import read_records
from fedspine.schedule_only import schedule
from fedspine.simulation import simulate
from fedspine.structure import Structure
from fedspine.types import Action, TrainRequest
from fedspine.workbench import workbench
from tests.small_run import KEYS, write_data, write_model
from tests.tiny import random_arrays, tiny_resident, tokens


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("apt")
    folders = {"model": str(write_model(base / "model")), "data": str(write_data(base / "data"))}
    return {**KEYS, **folders, "method": "apt", "fixed_rank": 4, "max_rank": 16, "rank_growth": 3.0}


def test_salience_is_that_of_a_gate_on_every_component() -> None:
    """|sum_j A_kj dL/dA_kj| is |dL/dg| of a factor g = 1 on component k: autograd through explicit gates."""
    resident = tiny_resident()
    shape, full = resident.shape, Structure.full(resident.shape)
    found, wanted = [], []
    for seed in (0, 1):
        resident.mount(full, random_arrays(resident, seed=seed))
        salience = RankSalience(resident)
        torch.autograd.backward(resident.model(**tokens()).logits.square().mean())
        salience.observe()
        found.append(np.array(salience.values()))
        gates = [torch.ones(6, requires_grad=True) for _ in shape.modules]
        gated = {
            f"{module.name}.lora_A.default.weight": gate[:, None] * resident.parameters[f"{module.name}.A"].detach()
            for module, gate in zip(shape.modules, gates, strict=True)
        }
        loss = torch.func.functional_call(resident.model, gated, kwargs=tokens()).logits.square().mean()
        wanted += [float(gradient.abs().mean()) for gradient in torch.autograd.grad(loss, gates)]
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-5)
    both = RankSalience(resident)
    for seed in (0, 1):
        resident.mount(full, random_arrays(resident, seed=seed))
        torch.autograd.backward(resident.model(**tokens()).logits.square().mean())
        both.observe()
    np.testing.assert_allclose(both.values(), (DECAY * found[0] + found[1]) / (DECAY + 1.0), rtol=1e-5)


def test_the_more_salient_half_is_scaled_to_the_budget() -> None:
    ranks, sizes = np.array([8, 8, 8, 8]), np.array([10, 10, 10, 30])
    salience = np.array([0.1, 0.4, 0.2, 0.3])
    budget = 1.5 * 8 * sizes.sum()
    assert grow(ranks, sizes, salience, budget, 64).tolist() == [8, 12, 8, 12]
    assert grow(ranks, sizes, salience, budget, 10).tolist() == [8, 10, 8, 10]
    assert grow(ranks, sizes, salience, 0.5 * budget, 64).tolist() == [8, 8, 8, 8]
    rng = np.random.default_rng(0)
    for step in np.linspace(1.0, 3.0, 60):
        budget = step * 8 * sizes.sum()
        grown = grow(ranks, sizes, rng.random(4), budget, 64)
        assert (grown >= ranks).all()
        assert grown @ sizes <= budget
        ranks = grown
    assert ranks @ sizes > 2.5 * 8 * sizes.sum()


def test_devices_count_alike_in_the_mean() -> None:
    np.testing.assert_allclose(mean_salience([(1.0, 3.0), (30.0, 10.0), (0.0, 0.0)]), [1 / 3, 1 / 3])


def test_new_components_change_nothing_and_can_train() -> None:
    resident = tiny_resident()
    shape, config = resident.shape, RunConfig(max_rank=6, fixed_rank=4)
    arrays = random_arrays(resident)
    for module in shape.modules:
        arrays[f"{module.name}.A"][4:] = 0
        arrays[f"{module.name}.B"][:, 4:] = 0
    awake = awakened(arrays, config, 3, shape)
    for module in shape.modules:
        a, b = f"{module.name}.A", f"{module.name}.B"
        assert (awake[a][:4] == arrays[a][:4]).all()
        assert awake[a][4:].any(1).all()
        assert (awake[b] @ awake[a] == arrays[b] @ arrays[a]).all()


def test_a_device_with_less_memory_has_its_share() -> None:
    config = RunConfig(fixed_rank=8)
    assert for_rank((8, 12, 30), 8, config) == (8, 12, 30)
    assert for_rank((8, 12, 30), 4, config) == (4, 6, 15)


def test_costs_are_those_of_every_projection(keys: dict[str, Any]) -> None:
    """Bytes, FLOPs and salience of one request whose projections have unequal ranks."""
    config = RunConfig.from_values({**keys, "target_sparsity": 0.0})
    bench = workbench(config.to_json())
    shape, full = bench.shape, Structure.full(bench.shape)
    ranks = tuple(2 + index % 3 for index in range(len(shape.modules)))
    arrays = narrow(bench.start, full, ranks, shape)
    assert ranks_of(arrays, shape) == ranks
    reply = train(TrainRequest(1, 0, Action(0.0, 4), full, arrays, None, config.to_json()))
    assert ranks_of(reply.arrays, shape) == ranks
    assert len(reply.report.module_salience) == len(ranks)
    assert reply.report.download_bytes == nbytes(arrays) + full.nbytes
    assert reply.report.upload_bytes == nbytes(arrays) + full.nbytes + 4 * len(ranks)
    work = bench.workload
    each = [
        work.iteration_flops(full.counts(), tuple(rank if i == k else 0 for i in range(len(ranks))))
        for k, rank in enumerate(ranks)
    ]
    base = work.iteration_flops(full.counts(), 0)
    assert work.iteration_flops(full.counts(), ranks) == pytest.approx(sum(each) - (len(each) - 1) * base)
    assert work.mean_rank((5,) * len(ranks)) == 5
    head = sum(array.nbytes for name, array in arrays.items() if name.startswith("head."))
    assert work.adapter_bytes(0.0, work.mean_rank(ranks)) == pytest.approx(nbytes(arrays))
    assert head == shape.head_bytes


def test_a_run_grows_where_it_matters(keys: dict[str, Any], tmp_path: Path) -> None:
    """Ranks rise along the ramp, unequally and within the budget; what is sent grows with them."""
    keys = {**keys, "ramp_ratio": 0.8, "warmup_ratio": 0.0}
    run = simulate(out=tmp_path / "run", **keys)
    config = RunConfig.from_values(keys)
    shape = workbench(config.to_json()).shape
    sizes = np.array([module.d_out + module.d_in for module in shape.modules])
    records = read_records(run.directory / "rounds.jsonl")
    history = [allotted(config, records[:done], shape) for done in range(len(records))]
    assert set(history[0]) == {4}
    assert len(set(history[-1])) > 1
    assert all((np.array(later) >= np.array(earlier)).all() for earlier, later in pairwise(history))
    assert 4 * sizes.sum() < np.array(history[-1]) @ sizes <= 3.0 * 4 * sizes.sum()
    assert max(history[-1]) <= 16
    assert records[-1].pulls[0].report.rank_after == max(history[-1])


def test_what_it_does_not_go_with_is_named(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank_growth = 3.0: engine = 'grouped' has one rank for all projections"):
        simulate(out=tmp_path / "run", engine="grouped", **keys)
    with pytest.raises(ConfigError, match=r"rank_growth = 2.0: what this costs follows from training"):
        schedule(out=tmp_path / "run", method="apt")
    with pytest.raises(ConfigError, match=r"policy = 'fedspine': with rank_growth = 2.0 it must be fixed"):
        RunConfig(rank_growth=2.0)
    assert not (tmp_path / "run").exists()
