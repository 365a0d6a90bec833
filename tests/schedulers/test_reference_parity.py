"""Agreement with the numbers of PeRFlow's published implementation (see reference/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

from perflow_blocks.schedulers import PeRFlowScheduler, PFODESolver, PFODESolverSDXL

pytestmark = pytest.mark.behaviour

REFERENCE = Path(__file__).parent.parent / "reference"
SCHEDULER_CASES: list[dict[str, Any]] = json.loads((REFERENCE / "scheduler.json").read_text())
SOLVER_CASES: list[dict[str, Any]] = json.loads((REFERENCE / "solver.json").read_text())

STEP_TOLERANCE = 1e-5
TRAJECTORY_TOLERANCE = 1e-3


def _name(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values() if value is not None)


@pytest.fixture(scope="module")
def scheduler_data() -> dict[str, Tensor]:
    return load_file(REFERENCE / "scheduler.safetensors")


@pytest.fixture(scope="module")
def solver_data() -> dict[str, Tensor]:
    return load_file(REFERENCE / "solver.safetensors")


def field(x: Tensor, t: Tensor, text: Tensor | float = 0.0, pooled: Tensor | float = 0.0, ids: Tensor | float = 0.0):
    """The formula that stands in for the UNet; all but x of shape (batch, 1, 1, 1) or numbers."""
    wave = torch.tanh(x * (1.2 - 0.5 * t)) + 0.3 * torch.sin(5 * t + x.flip(-1))
    return wave + 0.1 * text + 0.05 * pooled + 0.01 * ids


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def make_scheduler(case: dict[str, Any]) -> PeRFlowScheduler:
    scheduler = PeRFlowScheduler(
        prediction_type=case["prediction_type"],
        num_time_windows=case["num_time_windows"],
        beta_schedule=case["beta_schedule"],
    )
    scheduler.set_timesteps(case["num_inference_steps"])
    return scheduler


@pytest.mark.parametrize("case", SCHEDULER_CASES, ids=_name)
def test_each_step(case: dict[str, Any], scheduler_data: dict[str, Tensor]) -> None:
    scheduler = make_scheduler(case)
    name = case["case"]
    assert scheduler.timesteps.tolist() == scheduler_data[f"{name}.timesteps"].tolist()
    samples, outputs = scheduler_data[f"{name}.samples"], scheduler_data[f"{name}.model_outputs"]
    errors = {
        f"step {i} at timestep {t}": relative_error(scheduler.step(outputs[i], t, samples[i])[0], samples[i + 1])
        for i, t in enumerate(scheduler.timesteps.tolist())
    }
    differing = {step: error for step, error in errors.items() if not error <= STEP_TOLERANCE}
    assert not differing, f"relative errors above {STEP_TOLERANCE}: {differing}"


@pytest.mark.parametrize("case", SCHEDULER_CASES, ids=_name)
def test_whole_trajectory(case: dict[str, Any], scheduler_data: dict[str, Tensor]) -> None:
    scheduler = make_scheduler(case)
    samples = scheduler_data[f"{case['case']}.samples"]
    scale = samples.abs().max()
    sample = samples[0]
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.step(field(sample, t / 1000), t, sample).prev_sample
        error = ((sample - samples[i + 1]).abs().max() / scale).item()
        assert error <= TRAJECTORY_TOLERANCE, (
            f"step {i} at timestep {t}: the trajectory is off by {error} of its scale"
        )


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("column", ["start", "end", "gamma", "alpha_start", "alpha_end"])
def test_window_tables(num_windows: int, column: str, scheduler_data: dict[str, Tensor]) -> None:
    scheduler = PeRFlowScheduler(num_time_windows=num_windows)
    t = scheduler_data[f"windows{num_windows}.t"]
    expected = scheduler_data[f"windows{num_windows}.{column}"]
    actual = getattr(scheduler.get_window_alpha(t), column)
    difference = (actual - expected).abs()
    worst = int(difference.argmax())
    assert difference[worst] <= 1e-5, f"t = {t[worst]}: {actual[worst]} instead of {expected[worst]}"
    for i in range(0, 1000, 37):  # a time given as a number reads the same row
        assert getattr(scheduler.get_window_alpha(t[i].item()), column) == pytest.approx(expected[i].item(), abs=1e-5)


def test_add_noise(scheduler_data: dict[str, Tensor]) -> None:
    original, noise, timesteps, expected = (
        scheduler_data[f"add_noise.{name}"] for name in ("original", "noise", "timesteps", "result")
    )
    actual = PeRFlowScheduler().add_noise(original, noise, timesteps)
    for row, timestep in enumerate(timesteps.tolist()):
        assert relative_error(actual[row], expected[row]) <= STEP_TOLERANCE, f"timestep {timestep}"


class FormulaUNet:
    """`field` behind a UNet's signature; keeps the timesteps it was called with."""

    def __init__(self) -> None:
        self.timesteps: list[Tensor] = []

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool,
    ) -> tuple[Tensor]:
        assert not return_dict
        self.timesteps.append(timestep)
        rows = (-1, 1, 1, 1)
        pooled = ids = torch.zeros(())
        if added_cond_kwargs is not None:
            pooled = added_cond_kwargs["text_embeds"].mean(-1).reshape(rows)
            ids = added_cond_kwargs["time_ids"].mean(-1).reshape(rows) / 1024
        text = encoder_hidden_states.mean((1, 2)).reshape(rows)
        return (field(sample, timestep.reshape(rows) / 1000, text, pooled, ids),)


@pytest.mark.parametrize("case", SOLVER_CASES, ids=_name)
def test_teacher_solves_each_window(case: dict[str, Any], solver_data: dict[str, Tensor]) -> None:
    data = {key.partition(".")[2]: value for key, value in solver_data.items() if key.startswith(case["case"] + ".")}
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=case["prediction_type"],
    )
    unet = FormulaUNet()
    settings = {key: case[key] for key in ("guidance_scale", "num_steps", "num_windows")}
    settings |= {key: value for key, value in data.items() if key.endswith("prompt_embeds")}
    times = (data["t_start"], data["t_end"])
    if case["kind"] == "sdxl":
        solver = PFODESolverSDXL(scheduler)
        actual = solver.solve(data["latents_start"], unet, *times, resolution=case["resolution"], **settings)
    else:
        actual = PFODESolver(scheduler).solve(data["latents_start"], unet, *times, **settings)
    batch = len(data["latents_start"])
    called = torch.stack([timesteps[:batch] for timesteps in unet.timesteps], dim=1)
    assert called.tolist() == data["timesteps"].tolist(), "the teacher was asked at other timesteps"
    for row in range(batch):
        error = relative_error(actual[row], data["latents_end"][row])
        assert error <= TRAJECTORY_TOLERANCE, f"row {row}, from {times[0][row]} to {times[1][row]}: off by {error}"
