"""Steps of second order, of teacher and student: convergence, exact cases, and when a step is an Euler step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from perflow_blocks.schedulers import PeRFlowScheduler, PFODESolver
from perflow_blocks.testing.tiny import BETAS
from tests.conftest import no_host_reads

pytestmark = pytest.mark.behaviour


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(errors: dict[int, float]) -> float:
    """The order of convergence of errors by number of steps."""
    x, y = np.log(list(errors)), np.log(list(errors.values()))
    return float(-np.polyfit(x, y, 1)[0])


# --- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_teacher_converges_with_its_order(prediction_type: str, order: int) -> None:
    """For data from a normal distribution of deviation s the ODE is z / sqrt(abar s^2 + 1 - abar) = constant."""
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction_type, set_alpha_to_one=False)
    abar, spread = scheduler.alphas_cumprod.double(), 0.3

    def deviation(alpha: Tensor) -> Tensor:
        return (alpha * spread**2 + 1 - alpha).sqrt()

    def unet(sample: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        alpha = abar[timestep].reshape(-1, 1, 1, 1)
        noise = (1 - alpha).sqrt() * sample / deviation(alpha) ** 2
        x0 = alpha.sqrt() * spread**2 * sample / deviation(alpha) ** 2
        return (noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x0,)

    start, prompt = randn(2, 4, 3, 3), torch.zeros(2, 3, 4, dtype=torch.float64)
    t_start, t_end = torch.tensor([0.75, 0.5]), torch.tensor([0.5, 0.25])
    indices = (1000 * torch.stack([t_start, t_end])).long() - 1
    exact = start * (deviation(abar[indices[1]]) / deviation(abar[indices[0]])).reshape(-1, 1, 1, 1)
    solver = PFODESolver(scheduler, order=order)
    errors = {}
    for num_steps in (5, 10, 25, 50):
        solved = solver.solve(start, unet, t_start, t_end, prompt_embeds=prompt, num_steps=num_steps, num_windows=4)
        errors[num_steps] = float((solved - exact).norm() / exact.norm())
    assert abs(slope(errors) - order) < 0.25, errors


def test_a_teacher_that_starts_from_zero_snr_is_solved() -> None:
    """abar = 0 at the first timestep, where the noise alone would not tell the step."""
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    prompt = torch.zeros(1, 3, 4)
    for order in (1, 2):
        unet = lambda sample, timestep, **_: (torch.tanh(sample),)  # noqa: E731
        end = PFODESolver(scheduler, order=order).solve(
            randn(1, 4, 3, 3).float(), unet, 1.0, 0.75, prompt_embeds=prompt, num_steps=5, num_windows=4
        )
        assert bool(end.isfinite().all())


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order=3 must be 1"):
        PFODESolver(DDIMScheduler(**BETAS), order=3)
    with pytest.raises(ValueError, match="solver_order=0 must be 1 or 2"):
        PeRFlowScheduler(solver_order=0)


# --- the student -----------------------------------------------------------------------------------------------------


def run(scheduler: PeRFlowScheduler, sample: Tensor, velocity: Any) -> list[Tensor]:
    """The sample after each step of a schedule that was set."""
    samples = []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(sample, float(timestep) / 1000), timestep, sample).prev_sample
        samples.append(sample)
    return samples


@pytest.mark.parametrize("order", [1, 2])
def test_the_student_converges_with_its_order(order: int) -> None:
    """dz/dt = z cos(3 t), so that z(0) = z(1) exp(-sin(3)/3)."""
    scheduler = PeRFlowScheduler(prediction_type="velocity", num_time_windows=1, solver_order=order)
    start = randn(1, 4, 3, 3)
    exact, errors = start * math.exp(-math.sin(3.0) / 3.0), {}
    for num_steps in (10, 20, 40, 100):
        scheduler.set_timesteps(num_steps)
        end = run(scheduler, start, lambda sample, t: sample * math.cos(3 * t))[-1]
        errors[num_steps] = float((end - exact).norm() / exact.norm())
    assert abs(slope(errors) - order) < 0.25, errors


def test_equal_steps_weigh_three_halves_and_minus_one_half() -> None:
    scheduler = PeRFlowScheduler(prediction_type="velocity", num_time_windows=2, solver_order=2)
    scheduler.set_timesteps(6)
    start, velocities = randn(1, 4, 3, 3), [randn(1, 4, 3, 3, seed=seed) for seed in range(1, 7)]
    given = iter(velocities)
    samples = [start, *run(scheduler, start, lambda sample, t: next(given))]
    lengths = -np.diff([*scheduler.plan.timesteps, 0]) / 1000
    for i in range(6):
        step = -lengths[i] * velocities[i]
        if i in (1, 2, 4, 5):
            ratio = lengths[i] / lengths[i - 1]
            assert abs(ratio - 1) < 0.01
            step = step + 0.5 * ratio * (step - ratio * -lengths[i - 1] * velocities[i - 1])
        torch.testing.assert_close(samples[i + 1], samples[i] + step, rtol=1e-6, atol=1e-6)


def test_unequal_steps_are_exact_for_a_velocity_that_is_linear_in_time() -> None:
    scheduler = PeRFlowScheduler(prediction_type="velocity", num_time_windows=1, solver_order=2)
    scheduler.set_timesteps(timesteps=[1000, 850, 550, 400, 50])
    samples = run(scheduler, randn(1, 4, 3, 3), lambda sample, t: torch.full_like(sample, 1.0 - 4.0 * t))
    for before, after, t, end in zip(
        samples[:-1], samples[1:], (0.85, 0.55, 0.4, 0.05), (0.55, 0.4, 0.05, 0.0), strict=True
    ):
        exact = (end - 2 * end**2) - (t - 2 * t**2)
        torch.testing.assert_close(after - before, torch.full_like(after, exact), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["ddim_eps", "diff_eps", "velocity"])
def test_as_many_steps_as_windows_change_no_bit(prediction_type: str) -> None:
    runs = []
    for order in (1, 2):
        scheduler = PeRFlowScheduler(prediction_type=prediction_type, solver_order=order)
        scheduler.set_timesteps(4)
        runs.append(run(scheduler, randn(2, 4, 3, 3).half(), lambda sample, t: torch.tanh(sample) * t)[-1])
    assert torch.equal(*runs) and runs[0].dtype == torch.float16


def test_an_entry_inside_a_window_begins_with_an_euler_step() -> None:
    scheduler = PeRFlowScheduler(solver_order=2)
    whole = scheduler.make_plan(12)
    assert whole.step_ratio[:3] == (0.0, pytest.approx(1.0, rel=0.02), pytest.approx(1.0, rel=0.02))
    late = scheduler.plan_from(0.6, whole)
    assert late.timesteps[:3] == (600, 583, 500) and late.step_ratio[0] == 0.0
    assert scheduler.plan_from(0.64, whole).step_ratio[1] == pytest.approx(83 / 57, rel=0.05)
    assert whole.section(4, 6).step_ratio == (0.0, whole.step_ratio[5])


@pytest.mark.parametrize("start", [0.627, 0.6])
def test_a_step_after_a_very_short_one_is_an_euler_step(start: float) -> None:
    """Extrapolating far beyond two near points would amplify their difference."""
    scheduler = PeRFlowScheduler(solver_order=2)
    plan = scheduler.plan_from(start, scheduler.make_plan(8 if start == 0.627 else 12))
    assert plan.times[0] - plan.times[1] < 0.02 and plan.step_ratio[1] == 0.0


def test_a_changed_row_takes_an_euler_step_and_the_others_do_not() -> None:
    orders = {order: PeRFlowScheduler(solver_order=order, num_time_windows=1) for order in (1, 2)}
    sample, output = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    for scheduler in orders.values():
        scheduler.set_timesteps(4)
    after = orders[2].step(output, 1000, sample).prev_sample
    after[1, 0, 0, 0] += 1e-3  # in place, as a block or a callback may
    euler, second = (orders[order].step(-output, 750, after).prev_sample for order in (1, 2))
    assert torch.equal(euler[1], second[1]) and not torch.allclose(euler[0], second[0], atol=1e-3)


def test_a_new_schedule_forgets_the_step_before() -> None:
    scheduler = PeRFlowScheduler(solver_order=2, num_time_windows=1)
    for _ in range(2):
        scheduler.set_timesteps(4)
        samples = run(scheduler, randn(2, 4, 3, 3), lambda sample, t: torch.tanh(sample))
    small = run(scheduler, samples[-1][:1], lambda sample, t: torch.tanh(sample))  # another batch, no new schedule
    assert bool(small[-1].isfinite().all())


def test_a_timestep_on_a_device_gives_the_same_step_without_a_host_read(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = PeRFlowScheduler(solver_order=2, num_time_windows=1)
    scheduler.set_timesteps(4)
    start = randn(1, 4, 3, 3).float()
    expected = run(scheduler, start, lambda sample, t: torch.tanh(sample))
    scheduler.set_timesteps(4)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: type("Device", (), {"type": "pretend"})()))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    sample = start
    for t, wanted in zip(scheduler.timesteps.unbind(), expected, strict=True):
        with no_host_reads(methods=False):
            sample = scheduler.step(torch.tanh(sample), t, sample).prev_sample
        np.testing.assert_allclose(sample.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-5)
