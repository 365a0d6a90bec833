"""The three parameterizations: inverse, continuity, signs, and the clean sample, against independent derivations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from perflow_blocks.core.distillation import chord, marginal, student_output, window_endpoint
from perflow_blocks.core.noise_schedule import alpha_at, make_alphas_cumprod
from perflow_blocks.core.parameterization import (
    PREDICTION_TYPES,
    WindowAlpha,
    chord_coefficients,
    chord_marginal_coefficients,
    window_alpha,
    window_coefficients,
    window_table,
    x0_coefficients,
)
from perflow_blocks.core.step_plan import StepPlan, apply_step, build_step_plan, select_row
from perflow_blocks.core.windows import TimeWindows

ALPHAS = make_alphas_cumprod()
FOUR = TimeWindows.equal(4)
LAYOUTS = {
    "4 equal": FOUR,
    "3 equal": TimeWindows.equal(3),
    "1": TimeWindows.equal(1),
    "unequal": TimeWindows(boundaries=(1.0, 0.9, 0.55, 0.2, 0.0)),
}
each_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
each_layout = pytest.mark.parametrize("windows", LAYOUTS.values(), ids=LAYOUTS.keys())


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def window_at(windows: TimeWindows, t: float | Tensor) -> WindowAlpha:
    return window_alpha(windows, window_table(windows, ALPHAS), t)


def plan_for(windows: TimeWindows, prediction_type: str, num_steps: int) -> StepPlan:
    rows = window_table(windows, ALPHAS)
    return build_step_plan(windows, rows, prediction_type, windows.distribute_steps(num_steps))


# --- endpoints -------------------------------------------------------------------------------------------------------


@each_type
@each_layout
def test_the_endpoint_inverts_the_training_target_from_anywhere_on_the_chord(
    windows: TimeWindows, prediction_type: str
) -> None:
    z_start, z_end = randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    for row in window_table(windows, ALPHAS):
        output = student_output(z_start, z_end, row, prediction_type)
        for share in (0.0, 0.3, 0.99):
            t = row.start + share * (row.end - row.start)
            z_t = chord(z_start, z_end, t, row.start, row.end)
            torch.testing.assert_close(window_endpoint(z_t, output, row, prediction_type, t), z_end)
        again = student_output(z_start, window_endpoint(z_start, output, row, prediction_type), row, prediction_type)
        torch.testing.assert_close(again, output)


def test_velocity_points_from_noise_to_data() -> None:
    z_start, velocity = torch.zeros(1, 2), torch.ones(1, 2)
    # dz/dt = 1 and time runs down by a quarter.
    reached = window_endpoint(z_start, velocity, window_at(FOUR, 1.0), "velocity")
    torch.testing.assert_close(reached, torch.full((1, 2), -0.25))


def test_predicted_noise_is_taken_away() -> None:
    row = window_at(FOUR, 1.0)
    for prediction_type in ("ddim_eps", "diff_eps"):
        lam, eta = window_coefficients(row, prediction_type)
        assert lam > 1.0 and eta < 0.0
    gamma = math.sqrt(row.alpha_start / row.alpha_end)
    assert window_coefficients(row, "diff_eps") == pytest.approx((1 / gamma, -math.sqrt(1 - gamma**2) / gamma))


def test_ddim_eps_is_one_ddim_step_for_the_true_noise() -> None:
    x0, noise = randn(2, 5, seed=3), randn(2, 5, seed=4)
    for row in window_table(FOUR, ALPHAS):
        z_start, z_end = marginal(x0, noise, row.alpha_start), marginal(x0, noise, row.alpha_end)
        torch.testing.assert_close(student_output(z_start, z_end, row, "ddim_eps"), noise)


def test_unknown_types_and_integer_times_are_named() -> None:
    with pytest.raises(ValueError, match=r"prediction_type='epsilon'.*ddim_eps, diff_eps, velocity"):
        window_coefficients(window_at(FOUR, 1.0), "epsilon")
    with pytest.raises(ValueError, match=r"^t .*int64"):
        window_at(FOUR, torch.tensor([750]))


# --- noising and the clean sample ------------------------------------------------------------------------------------


@each_layout
def test_the_chord_ends_on_marginals_and_is_continuous_over_edges(windows: TimeWindows) -> None:
    x0, noise = randn(2, 5, seed=3), randn(2, 5, seed=4)
    rows = window_table(windows, ALPHAS)
    for row in rows:
        for t in (row.start, row.end):
            on_chord = apply_step(x0, noise, *chord_marginal_coefficients(row, t))
            torch.testing.assert_close(on_chord, marginal(x0, noise, alpha_at(ALPHAS, float(t))))
    for upper, lower in itertools.pairwise(rows):
        assert (upper.end, upper.alpha_end) == (lower.start, lower.alpha_start)


def test_the_chord_is_off_the_marginal_inside_a_window() -> None:
    x0, noise = randn(2, 5, seed=3), randn(2, 5, seed=4)
    row = window_at(FOUR, 0.625)
    inside = apply_step(x0, noise, *chord_marginal_coefficients(row, 0.625))
    middle = (marginal(x0, noise, row.alpha_start) + marginal(x0, noise, row.alpha_end)) / 2
    torch.testing.assert_close(inside, middle)
    assert (inside - marginal(x0, noise, alpha_at(ALPHAS, 0.625))).abs().max() > 0.01


@each_type
@each_layout
def test_clean_sample_is_exact_for_known_data(windows: TimeWindows, prediction_type: str) -> None:
    x0, noise = randn(2, 5, seed=3), randn(2, 5, seed=4)
    for row in window_table(windows, ALPHAS):
        z_start, z_end = marginal(x0, noise, row.alpha_start), marginal(x0, noise, row.alpha_end)
        output = student_output(z_start, z_end, row, prediction_type)
        for share in (0.0, 0.5, 0.9):
            t = row.start + share * (row.end - row.start)
            z_t = apply_step(x0, noise, *chord_marginal_coefficients(row, t))
            predicted = apply_step(z_t, output, *x0_coefficients(row, t, prediction_type))
            torch.testing.assert_close(predicted, x0, rtol=1e-9, atol=1e-9)


def test_clean_sample_of_ddim_eps_by_its_own_formula() -> None:
    z_t, eps = randn(2, 5, seed=5), randn(2, 5, seed=6)  # arbitrary, not on any data's path
    row = window_at(FOUR, 0.6)
    z_end = window_endpoint(z_t, eps, row, "ddim_eps", 0.6)
    expected = (z_end - math.sqrt(1 - row.alpha_end) * eps) / math.sqrt(row.alpha_end)
    torch.testing.assert_close(apply_step(z_t, eps, *x0_coefficients(row, 0.6, "ddim_eps")), expected)


# --- batches and types -----------------------------------------------------------------------------------------------


@each_type
def test_rows_of_a_batch_may_lie_in_different_windows(prediction_type: str) -> None:
    t = torch.tensor([1.0, 0.6, 0.25, 0.01], dtype=torch.float64)
    z_start, z_end = randn(4, 2, 3, 3, seed=1), randn(4, 2, 3, 3, seed=2)
    rows = window_at(FOUR, t)
    output = student_output(z_start, z_end, rows, prediction_type)
    z_t = chord(z_start, z_end, t, rows.start, rows.end)
    x0 = apply_step(z_t, output, *x0_coefficients(rows, t, prediction_type))
    end = window_endpoint(z_t, output, rows, prediction_type, t)
    for i, time in enumerate(t.tolist()):
        row = window_at(FOUR, time)
        one = student_output(z_start[i], z_end[i], row, prediction_type)
        torch.testing.assert_close(output[i], one)
        torch.testing.assert_close(z_t[i], chord(z_start[i], z_end[i], time, row.start, row.end))
        torch.testing.assert_close(x0[i], apply_step(z_t[i], one, *x0_coefficients(row, time, prediction_type)))
        torch.testing.assert_close(end[i], window_endpoint(z_t[i], one, row, prediction_type, time))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_keep_the_samples_type_and_do_not_round_twice(dtype: torch.dtype) -> None:
    x, y = randn(64, seed=1, dtype=dtype), randn(64, seed=2, dtype=dtype)
    a, b = 3.4567891, -3.4012345
    result = apply_step(x, y, torch.tensor(a), torch.tensor(b))
    assert result.dtype == dtype
    exact = a * x.double() + b * y.double()
    assert bool(((result.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 2e-6).all())


def test_window_numbers_of_a_batch() -> None:
    row = window_at(FOUR, torch.tensor([[0.75, 0.8]]))
    assert torch.equal(torch.as_tensor(row.start), torch.tensor([[0.75, 1.0]]))
    assert torch.equal(torch.as_tensor(row.end), torch.tensor([[0.5, 0.75]]))
    torch.testing.assert_close(row.gamma, (row.alpha_start / row.alpha_end) ** 0.5)


# --- the plan --------------------------------------------------------------------------------------------------------


@each_type
@each_layout
@pytest.mark.parametrize("num_steps", [4, 7, 24])
def test_euler_integrates_a_piecewise_linear_student_exactly(
    windows: TimeWindows, prediction_type: str, num_steps: int
) -> None:
    """Whatever the number of steps, the path meets the given points at the window edges, and ends at the last one."""
    points = [randn(2, 3, seed=seed) for seed in range(windows.num_windows + 1)]
    plan = plan_for(windows, prediction_type, num_steps)
    rows = window_table(windows, ALPHAS)
    # Thirds of 1000 are truncated: a step then starts up to one timestep below the edge, on the next window's chord.
    tolerance = 1e-9 if windows is not LAYOUTS["3 equal"] else 0.02
    sample = points[0]
    for i, k in enumerate(plan.window_index):
        output = student_output(points[k], points[k + 1], rows[k], prediction_type)
        expected = chord(points[k], points[k + 1], plan.times[i], rows[k].start, rows[k].end)
        torch.testing.assert_close(sample, expected, rtol=tolerance, atol=tolerance)
        sample = apply_step(sample, output, plan.sample_coeff[i], plan.output_coeff[i])
    torch.testing.assert_close(sample, points[-1], rtol=tolerance, atol=tolerance)
    assert plan.next_times[-1] == 0.0


@each_type
def test_the_last_step_from_deep_in_the_last_window_is_finite_and_exact(prediction_type: str) -> None:
    plan = build_step_plan(FOUR, window_table(FOUR, ALPHAS), prediction_type, [1 / 1000])
    row = window_at(FOUR, 0.001)
    z_start, z_end = randn(2, 3, seed=1), randn(2, 3, seed=2)
    output = student_output(z_start, z_end, row, prediction_type)
    z_t = chord(z_start, z_end, 0.001, row.start, row.end)
    torch.testing.assert_close(apply_step(z_t, output, plan.sample_coeff[0], plan.output_coeff[0]), z_end)
    assert abs(plan.sample_coeff[0]) < 2 and all(map(math.isfinite, plan.coefficients().flatten().tolist()))


@each_type
def test_one_step_is_the_chord_velocity_times_the_time_between(prediction_type: str) -> None:
    plan = plan_for(FOUR, prediction_type, 10)
    sample, output = randn(2, 3, seed=1), randn(2, 3, seed=2)
    for i, t in enumerate(plan.times):
        row = window_at(FOUR, t)
        velocity = (window_endpoint(sample, output, row, prediction_type, t) - sample) / (row.end - t)
        expected = sample + (plan.next_times[i] - t) * velocity
        torch.testing.assert_close(apply_step(sample, output, plan.sample_coeff[i], plan.output_coeff[i]), expected)
        x0 = apply_step(sample, output, plan.x0_sample_coeff[i], plan.x0_output_coeff[i])
        torch.testing.assert_close(x0, apply_step(sample, output, *x0_coefficients(row, t, prediction_type)))


def test_a_plan_reads_its_windows_from_truncated_timesteps() -> None:
    plan = plan_for(TimeWindows.equal(3), "ddim_eps", 6)
    assert len(plan) == 6
    assert plan.timesteps == (1000, 833, 666, 500, 333, 166)
    assert plan.window_index == (0, 0, 1, 1, 2, 2)
    assert [plan.begins_window(i) for i in range(6)] == [True, False] * 3
    assert plan.times == tuple(t / 1000 for t in plan.timesteps)
    assert plan.next_times == (*plan.times[1:], 0.0)
    late = plan.section(3, 5)
    assert late.timesteps == (500, 333) and late.output_coeff == plan.output_coeff[3:5] and late.begins_window(0)


def test_coefficient_table_matches_the_fields() -> None:
    plan = plan_for(FOUR, "ddim_eps", 5)
    table = plan.coefficients(dtype=torch.float64)
    expected = zip(plan.sample_coeff, plan.output_coeff, plan.x0_sample_coeff, plan.x0_output_coeff, strict=True)
    assert [tuple(row) for row in table.tolist()] == list(expected)
    assert plan.coefficients().dtype == torch.float32


def test_rows_are_selected_by_timestep_and_unknown_ones_are_nan() -> None:
    table, timesteps = torch.arange(8.0).reshape(2, 4), torch.tensor([1000, 500])
    assert select_row(table, timesteps, torch.tensor(500)).tolist() == [4.0, 5.0, 6.0, 7.0]
    assert select_row(table, timesteps, torch.tensor([1000.0])).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert bool(select_row(table, timesteps, torch.tensor(501)).isnan().all())


def test_coefficients_at_a_window_start_are_those_of_the_window() -> None:
    row = window_at(FOUR, 0.5)
    for prediction_type in ("ddim_eps", "diff_eps"):
        expected = window_coefficients(row, prediction_type)
        assert chord_coefficients(row, row.start, prediction_type) == pytest.approx(expected)
