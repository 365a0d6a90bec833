"""Straightness: 0 for lines, the value computed by hand for curves; the teacher's on the solve that is trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from perflow_blocks.core.distillation import student_output
from perflow_blocks.core.noise_schedule import make_alphas_cumprod
from perflow_blocks.core.parameterization import PREDICTION_TYPES, WindowAlpha, window_table
from perflow_blocks.core.windows import TimeWindows
from perflow_blocks.training.config import WindowConfig
from perflow_blocks.training.straightness import (
    FixedInputs,
    StraightnessProbe,
    path_straightness,
    student_path,
    window_times,
)
from tests.training.conftest import SCHEDULE, PlainEncoder, PointTeacher, toy_teacher

SHAPE = (3, 4, 2, 2)


def windows(number: int, count: int = 3) -> WindowAlpha:
    table = window_table(TimeWindows.equal(4), make_alphas_cumprod(**SCHEDULE))[number]
    return WindowAlpha(*(torch.full((count,), float(value)) for value in table))


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("number", range(4))
def test_a_piecewise_linear_student_has_none_and_ends_where_its_line_does(prediction_type: str, number: int) -> None:
    window, z_start, z_end = windows(number), noise(1), noise(2)
    output = student_output(z_start, z_end, window, prediction_type)
    points = student_path(lambda z, t: output, z_start, window, prediction_type, num_steps=7)
    found = path_straightness(points, window_times(window, 7))
    assert found.relative().item() < 1e-8
    torch.testing.assert_close(points[-1], z_end, rtol=1e-4, atol=1e-5)
    speed = ((z_end - z_start) / 0.25).flatten(1).square().mean(1)
    torch.testing.assert_close(found.chord, speed, rtol=1e-3, atol=0)


def test_a_velocity_that_grows_with_time_has_the_variance_of_its_steps() -> None:
    """v = a t in n steps from s to e: the deviation is a^2 times the variance of the n times that are asked."""
    window, a, n = windows(1), 3.0, 8
    points = student_path(
        lambda z, t: a * t[:, None, None, None].expand_as(z), noise(0), window, "velocity", num_steps=n
    )
    found = path_straightness(points, window_times(window, n))
    asked = torch.tensor([0.75 - 0.25 * k / n for k in range(n)])
    deviation = a**2 * 0.25**2 * (n**2 - 1) / (12 * n**2)
    torch.testing.assert_close(found.deviation, torch.full((3,), deviation), rtol=1e-4, atol=0)
    expected = deviation / (a * asked.mean().item()) ** 2
    assert found.relative().item() == pytest.approx(expected, rel=1e-4)


def test_unequal_steps_count_by_their_length() -> None:
    times = torch.tensor([1.0, 0.5, 0.25])[:, None]
    points = torch.tensor([0.0, 1.0, 3.0])[:, None, None]  # velocities -2 and -8, of the chord -4
    found = path_straightness(points, times)
    assert found.deviation.item() == pytest.approx((2 / 3) * 2**2 + (1 / 3) * 4**2)
    assert found.chord.item() == pytest.approx(16.0)


def test_paths_of_several_rows_are_averaged_before_they_are_divided() -> None:
    times = torch.tensor([1.0, 0.5, 0.0])[:, None].expand(-1, 2)
    points = torch.tensor([[0.0, 0.0], [1.0, 10.0], [4.0, 20.0]])[..., None]
    found = path_straightness(points, times)
    assert found.deviation.tolist() == pytest.approx([4.0, 0.0])
    assert found.relative().item() == pytest.approx(2.0 / 208.0)


def probe(teacher: Any, rows_at_once: int = 2) -> StraightnessProbe:
    inputs = FixedInputs(
        prompts=("a", "b", "c"),
        rows=[PlainEncoder().row(value) for value in (0.5, 1.0, 2.0)],
        time_ids=torch.zeros(3, 6),
        noise=noise(3),
    )
    return StraightnessProbe(teacher, inputs, rows_at_once)


def test_the_path_of_the_teacher_ends_where_its_solve_does() -> None:
    teacher = toy_teacher(PointTeacher(), steps_per_window=5)
    window = windows(2)
    rows = [PlainEncoder().row(value) for value in (0.5, 1.0, 2.0)]
    path = teacher.path(noise(3), window_times(window, 5), rows, torch.zeros(3, 6))
    assert path.shape == (6, *SHAPE)
    torch.testing.assert_close(path[-1], teacher.solve(noise(3), window, rows, torch.zeros(3, 6)))


class Lines:
    """A student that knows where the teacher ends: the line there, or the way back where `sign` is -1."""

    def __init__(self, teacher: Any, sign: float = 1.0) -> None:
        self.teacher, self.sign = teacher, sign
        self.outputs: dict[tuple[int, int], Tensor] = {}

    def __call__(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any) -> tuple[Tensor]:
        number = int(((1000 - timestep[0]) / 250 + 1e-4).item())
        key = (number, round(encoder_hidden_states.flatten()[0].item() * 100))
        if timestep[0].item() == 1000 - 250 * number and key not in self.outputs:
            rows = [PlainEncoder().row(value) for value in encoder_hidden_states[:, 0, 0].tolist()]
            window = windows(number, len(sample))
            z_end = self.teacher.solve(sample, window, rows, torch.zeros(len(sample), 6))
            target = sample + self.sign * (z_end - sample)
            self.outputs[key] = student_output(sample, target, window, "velocity")
        return (self.outputs[key],)


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_a_student_of_the_teacher_s_lines_is_straight_and_right(rows_at_once: int) -> None:
    teacher = toy_teacher(PointTeacher(), WindowConfig(prediction_type="velocity"), steps_per_window=5)
    reading = probe(teacher, rows_at_once).measure(Lines(teacher), 7)
    assert reading.step == 7
    assert max(reading.student) < 1e-8 and max(reading.endpoint_error) < 1e-8
    assert min(reading.teacher) > 1e-5  # curved
    assert len(reading.student) == len(reading.teacher) == len(reading.endpoint_error) == 4
    names = reading.figures()
    assert names["straightness/teacher_3"] == reading.teacher[3] and len(names) == 12


def test_a_straight_student_that_goes_the_wrong_way_is_told() -> None:
    teacher = toy_teacher(PointTeacher(), WindowConfig(prediction_type="velocity"), steps_per_window=5)
    reading = probe(teacher).measure(Lines(teacher, sign=-1.0), 0)
    assert max(reading.student) < 1e-8
    assert reading.endpoint_error[0] == pytest.approx(4.0, rel=1e-4)  # twice the chord away


def curved(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any) -> tuple[Tensor]:
    return (sample * encoder_hidden_states.flatten()[:, None, None, None] * 0.3,)


def test_chunks_change_nothing() -> None:
    teacher = toy_teacher(PointTeacher(), steps_per_window=5)
    one, all_at_once = (probe(teacher, size).measure(curved, 1) for size in (1, 3))
    for name in ("student", "teacher", "endpoint_error"):
        assert getattr(one, name) == pytest.approx(getattr(all_at_once, name), rel=1e-4)
        assert min(getattr(one, name)) > 0
