"""Theta, the relative corrections of a window's steps: what they do, and that they come back from wherever they go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from perflow_blocks.schedulers import PeRFlowScheduler
from perflow_blocks.schedulers.scheduling_perflow import STATE_FILE

pytestmark = pytest.mark.behaviour

THETA = [[0.01, -0.02], [0.0, 0.03], [-0.04, 0.0], [0.05, 0.06]]


def run(scheduler: PeRFlowScheduler, num_steps: int = 6) -> Tensor:
    scheduler.set_timesteps(num_steps)
    sample = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.tanh(sample), timestep, sample).prev_sample
    return sample


def test_every_step_of_a_window_gets_its_row() -> None:
    plain, corrected = PeRFlowScheduler().make_plan(6), PeRFlowScheduler(theta=THETA).make_plan(6)
    assert corrected.window_index == (0, 0, 1, 1, 2, 3)
    for i, k in enumerate(corrected.window_index):
        assert corrected.sample_coeff[i] == pytest.approx((1 + THETA[k][0]) * plain.sample_coeff[i], rel=1e-12)
        assert corrected.output_coeff[i] == pytest.approx((1 + THETA[k][1]) * plain.output_coeff[i], rel=1e-12)
    assert (corrected.x0_sample_coeff, corrected.x0_output_coeff) == (plain.x0_sample_coeff, plain.x0_output_coeff)
    assert corrected.uncorrected == plain and plain.uncorrected is None
    assert corrected.section(2, 4).uncorrected == plain.section(2, 4)


def test_zeros_change_no_bit() -> None:
    assert torch.equal(run(PeRFlowScheduler(theta=torch.zeros(4, 2))), run(PeRFlowScheduler()))
    assert not torch.equal(run(PeRFlowScheduler(theta=THETA)), run(PeRFlowScheduler()))


@pytest.mark.parametrize("theta", [[[0.0, float("nan")]] * 4, [[0.0, 0.0]] * 3, [0.0] * 8, torch.zeros(4, 3), "abc"])
def test_a_theta_that_is_not_finite_or_of_another_shape_is_refused(theta: Any) -> None:
    with pytest.raises(ValueError, match=r"theta=.* 2 finite numbers for each of 4 windows"):
        PeRFlowScheduler(theta=theta)


# --- round trips -----------------------------------------------------------------------------------------------------


def test_the_configuration_keeps_theta_and_order(tmp_path: Path) -> None:
    scheduler = PeRFlowScheduler(theta=torch.tensor(THETA, dtype=torch.float64), solver_order=2)
    made = PeRFlowScheduler.from_config(scheduler.config)
    assert made.config.theta == THETA and made.config.solver_order == 2
    there = DPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=3)
    back = PeRFlowScheduler.from_config(there.config)
    assert back.config.theta == THETA and back.config.solver_order == 2
    assert torch.equal(run(back), run(scheduler))


def test_the_order_of_another_class_is_not_taken_over() -> None:
    other = DPMSolverMultistepScheduler(solver_order=3)
    assert PeRFlowScheduler.from_config(other.config).config.solver_order == 1
    assert PeRFlowScheduler.from_config({**other.config, "_class_name": "DPMSolver"}).config.solver_order == 1
    assert DPMSolverMultistepScheduler.from_config(PeRFlowScheduler().config).config.solver_order == 2
    changed = {**PeRFlowScheduler().config, "solver_order": 2}
    assert PeRFlowScheduler.from_config(changed).config.solver_order == 2


def test_a_saved_scheduler_holds_a_state_file_that_is_read(tmp_path: Path) -> None:
    scheduler = PeRFlowScheduler(theta=THETA, num_time_windows=4)
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert torch.equal(run(PeRFlowScheduler.from_pretrained(tmp_path, subfolder="scheduler")), run(scheduler))
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    assert config.pop("theta") == THETA
    file.write_text(json.dumps(config))
    loaded, _ = PeRFlowScheduler.from_pretrained(tmp_path / "scheduler", return_unused_kwargs=True)
    assert loaded.config.theta == THETA
    assert PeRFlowScheduler.from_pretrained(tmp_path / "scheduler", theta=None).config.theta is None
    PeRFlowScheduler().save_pretrained(tmp_path / "scheduler")
    assert not (tmp_path / "scheduler" / STATE_FILE).exists()
    assert PeRFlowScheduler.from_pretrained(tmp_path / "scheduler").config.theta is None


def test_the_state_names_theta_and_its_windows() -> None:
    state = PeRFlowScheduler(window_boundaries=(1.0, 0.4, 0.0)).state_dict()["perflow"]
    assert set(state) == {"theta", "segments", "segment_boundaries", "version"}
    assert torch.equal(state["theta"], torch.zeros(2, 2, dtype=torch.float64)) and state["segments"] == 2
    assert state["segment_boundaries"].tolist() == [1.0, 0.4, 0.0]


def test_a_state_comes_back() -> None:
    scheduler, other = PeRFlowScheduler(theta=THETA), PeRFlowScheduler()
    assert other.load_state_dict(scheduler.state_dict()) == []
    assert torch.equal(run(other), run(scheduler)) and other.config.theta == THETA
    other.load_state_dict(PeRFlowScheduler().state_dict())
    assert other.config.theta is None


@pytest.mark.parametrize(
    ("change", "wrong", "loaded"),
    [
        ({"theta": torch.zeros(3, 2)}, ["theta"], False),
        ({"theta": None}, ["theta"], False),
        ({"theta": "abc"}, ["theta"], False),
        ({"segments": None, "version": None}, ["segments", "version"], True),
        ({"segment_boundaries": torch.tensor([1.0, 0.7, 0.5, 0.2, 0.0])}, ["segment_boundaries"], True),
        ({"more": 1}, ["more"], True),
    ],
)
def test_a_state_that_does_not_fit(change: dict[str, Any], wrong: list[str], loaded: bool) -> None:
    given = {**PeRFlowScheduler(theta=THETA).state_dict()["perflow"], **change}
    state = {"perflow": {name: value for name, value in given.items() if value is not None}}
    scheduler = PeRFlowScheduler()
    with pytest.raises(ValueError, match=f"{', '.join(wrong)} of the state .*strict=False"):
        scheduler.load_state_dict(state)
    assert scheduler.config.theta is None
    assert scheduler.load_state_dict(state, strict=False) == wrong
    assert scheduler.config.theta == (THETA if loaded else None)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_is_not_finite_is_refused(strict: bool) -> None:
    state = PeRFlowScheduler(theta=THETA).state_dict()
    state["perflow"]["theta"][1, 1] = torch.inf
    scheduler = PeRFlowScheduler()
    with pytest.raises(ValueError, match="finite"):
        scheduler.load_state_dict(state, strict=strict)
    assert scheduler.config.theta is None
