"""This machine as a device of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedspine.cli import main
from fedspine.study.design import load_study
from fedspine.study.estimate import device_meter
from fedspine.study.run import plan_study
from tests.study.test_run import write_study


def test_one_step_makes_a_device_whose_plan_follows_the_flops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, device = write_study(tmp_path, 'learner = ["rag", "lora"]\nbudget = [8]'), tmp_path / "here.toml"
    path.write_text(path.read_text().replace("seeds = 2", "seeds = 1"))
    command = ["study", "calibrate", str(path), "--out", str(device)]
    assert main(command) == 0
    state = device_meter(str(device)).state
    assert state.flops_per_second > 1e6
    assert state.memory_bytes > 1e8
    (on_board,) = (plan.estimate.seconds for plan in plan_study(load_study(path)) if plan.local_steps)
    path.write_text(path.read_text().replace("board.toml", "here.toml"))
    (here,) = (plan.estimate.seconds for plan in plan_study(load_study(path)) if plan.local_steps)
    assert here * state.flops_per_second == pytest.approx((on_board - 8 * 0.003) * 1e9)  # 1 GFLOP/s, 3 ms a step
    capsys.readouterr()
    assert main(command) == 2
    assert "must be a new file" in capsys.readouterr().err
    path.write_text(path.read_text().replace('"lora"', '"none"'))
    assert main([*command[:-1], str(tmp_path / "other.toml")]) == 2
    assert "no cell trains in float32, so there is no step to time" in capsys.readouterr().err
