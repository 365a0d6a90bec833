"""What the student is trained towards, against the teacher's solver: exact on straight paths, right in sign."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from perflow_blocks.core.distillation import marginal, student_output
from perflow_blocks.core.parameterization import PREDICTION_TYPES
from perflow_blocks.training.config import LossConfig, WindowConfig
from perflow_blocks.training.pairs import WindowPairs, distillation_step, row_losses, row_weights
from perflow_blocks.training.teacher import WindowGeometry
from tests.training.conftest import SCHEDULE, PlainEncoder, PointTeacher, toy_teacher

each_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
PLAIN = LossConfig()
UNEQUAL = (1.0, 0.8, 0.3, 0.0)


def pairs_of(windows: WindowConfig, *, steps: int = 5, rows_per_window: int = 2, seed: int = 0) -> WindowPairs:
    """Marginals of one picture at the start of every window, and what the teacher makes of them."""
    teacher = toy_teacher(PointTeacher(), windows, steps_per_window=steps)
    count = rows_per_window * teacher.geometry.num_windows
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(teacher.geometry.num_windows).repeat(rows_per_window)
    window = teacher.geometry.rows(index)
    z_start = marginal(torch.full((count, 4, 2, 2), 0.5), torch.randn(count, 4, 2, 2, generator=generator), window[3])
    conditioning = PlainEncoder().conditioning([0] * count)
    return WindowPairs(
        z_start=z_start,
        z_end=teacher.solve(z_start, window, conditioning),
        index=index,
        conditioning=conditioning,
        uniform=torch.rand(count, generator=generator),
    )


class LinearStudent:
    """Piecewise linear: on the line from z_start it goes `w` times as far as the teacher went."""

    def __init__(self, pairs: WindowPairs, geometry: WindowGeometry, w: Tensor | float = 1.0) -> None:
        window, kind = geometry.rows(pairs.index), geometry.config.prediction_type
        self.there = student_output(pairs.z_start, pairs.z_end, window, kind)
        self.still = student_output(pairs.z_start, pairs.z_start, window, kind)
        self.w = w
        self.samples: list[Tensor] = []
        self.timesteps: list[Tensor] = []

    def __call__(self, sample: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        self.samples.append(sample)
        self.timesteps.append(timestep)
        return (self.still + self.w * (self.there - self.still),)


class ExactStudent:
    """Of data that is one picture: the output that leads from marginal to marginal, with the same noise in both."""

    def __init__(self, pairs: WindowPairs, geometry: WindowGeometry) -> None:
        window = geometry.rows(pairs.index)
        x0 = torch.full_like(pairs.z_start, 0.5)
        noise = (pairs.z_start - _rows(window.alpha_start) ** 0.5 * x0) / (1 - _rows(window.alpha_start)) ** 0.5
        end = marginal(x0, noise, window.alpha_end)
        self.output = student_output(pairs.z_start, end, window, geometry.config.prediction_type)

    def __call__(self, sample: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        return (self.output,)


@each_type
@pytest.mark.parametrize(
    "windows",
    [
        {},
        {"num_time_windows": 3},
        {"num_time_windows": 6},
        {"num_time_windows": 16},
        {"window_boundaries": (1.0, 0.5504, 0.3337, 0.0)},
    ],
)
def test_a_student_on_the_exact_flow_has_no_loss(prediction_type: str, windows: dict[str, Any]) -> None:
    """Windows that begin between two timesteps too: teacher and student mean the same noise by such a time."""
    config = WindowConfig(prediction_type=prediction_type, **windows)  # type: ignore[arg-type]
    geometry, pairs = WindowGeometry(config, SCHEDULE), pairs_of(config, steps=4)
    step = distillation_step(ExactStudent(pairs, geometry), pairs, geometry, PLAIN)
    assert float(step.window_sums.max()) < 1e-9


@each_type
@pytest.mark.parametrize("boundaries", [None, UNEQUAL])
@pytest.mark.parametrize("weighting", ["none", "endpoint", "reciprocal"])
def test_a_piecewise_linear_student_has_no_loss(
    prediction_type: str, boundaries: tuple[float, ...] | None, weighting: str
) -> None:
    windows = WindowConfig(prediction_type=prediction_type, window_boundaries=boundaries)  # type: ignore[arg-type]
    pairs, geometry = pairs_of(windows), WindowGeometry(windows, SCHEDULE)
    loss = LossConfig(weighting=weighting)  # type: ignore[arg-type]
    student = LinearStudent(pairs, geometry)
    assert float(distillation_step(student, pairs, geometry, loss).loss) < 1e-9
    wrong = LinearStudent(pairs, geometry, w=-1.0)
    assert float(distillation_step(wrong, pairs, geometry, loss).loss) > 1e-3


@each_type
@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_one_parameter_finds_the_teacher_s_end_from_either_side(prediction_type: str, kind: str) -> None:
    windows = WindowConfig(prediction_type=prediction_type)  # type: ignore[arg-type]
    pairs, geometry = pairs_of(windows), WindowGeometry(windows, SCHEDULE)
    for first in (-1.0, 3.0):
        w = torch.tensor(first, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=0.1)
        for _ in range(150):
            optimizer.zero_grad()
            student = LinearStudent(pairs, geometry, w)
            distillation_step(student, pairs, geometry, LossConfig(kind=kind)).loss.backward()  # type: ignore[arg-type]
            optimizer.step()
        assert w.item() == pytest.approx(1.0, abs=2e-2)


def test_the_ddim_target_of_one_picture_is_its_noise() -> None:
    """So sign and scale are right by the model, and not only consistent with themselves."""
    windows = WindowConfig()
    pairs, geometry = pairs_of(windows), WindowGeometry(windows, SCHEDULE)
    alpha = _rows(geometry.rows(pairs.index).alpha_start)
    noise = (pairs.z_start - alpha**0.5 * 0.5) / (1 - alpha) ** 0.5
    torch.testing.assert_close(LinearStudent(pairs, geometry).there, noise, rtol=1e-2, atol=1e-2)


def test_the_student_is_asked_on_the_chord_at_t_t() -> None:
    windows = WindowConfig()
    pairs, geometry = pairs_of(windows), WindowGeometry(windows, SCHEDULE)
    student = LinearStudent(pairs, geometry)
    distillation_step(student, pairs, geometry, PLAIN)
    t = student.timesteps[0] / 1000
    start, end = (torch.as_tensor(v) for v in geometry.rows(pairs.index)[:2])
    assert bool(((t <= start) & (t > end)).all()) and len(set(t.tolist())) > 4
    share = ((t - start) / (end - start))[:, None, None, None]
    torch.testing.assert_close(student.samples[0], pairs.z_start + share * (pairs.z_end - pairs.z_start))


def test_discrete_times_are_the_grid_s_and_stay_in_their_windows() -> None:
    for boundaries, count in ((None, 200), (None, 4), (UNEQUAL, 7)):
        config = WindowConfig(times="discrete", num_discrete_times=count, window_boundaries=boundaries)
        geometry = WindowGeometry(config, SCHEDULE)
        index = torch.arange(geometry.num_windows).repeat_interleave(500)
        window = geometry.rows(index)
        t = geometry.times(window, torch.rand(len(index), generator=torch.Generator().manual_seed(0)))
        assert bool(((t <= window.start) & (t > window.end)).all())
        on_grid = (t * count - torch.round(t * count)).abs() < 1e-3
        assert bool((on_grid | (t == window.start)).all())
        if count == 200:
            assert len({round(value, 4) for value in t.tolist()}) == 200
        edge = geometry.times(window, torch.full((len(index),), 1 - 2**-24))
        assert bool(((edge <= window.start) & (edge > window.end)).all())


def test_window_losses_count_the_rows_of_each_window() -> None:
    windows = WindowConfig()
    geometry = WindowGeometry(windows, SCHEDULE)
    pairs = pairs_of(windows, rows_per_window=2)
    keep = pairs.index != 2
    pairs = dataclasses.replace(
        pairs,
        z_start=pairs.z_start[keep],
        z_end=pairs.z_end[keep],
        index=pairs.index[keep],
        uniform=pairs.uniform[keep],
    )
    student = LinearStudent(pairs, geometry, w=0.0)
    got = distillation_step(student, pairs, geometry, LossConfig())
    assert got.window_counts.tolist() == [2, 2, 0, 2]
    errors = (student.still - student.there).square().flatten(1).mean(1)
    for number in (0, 1, 3):
        torch.testing.assert_close(got.window_sums[number], errors[pairs.index == number].sum())
    torch.testing.assert_close(got.loss, errors.mean())


def test_guidance_modes_tell_the_teacher_different_things() -> None:
    prompts = PlainEncoder().conditioning([1, 0])
    z = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    ends = {}
    for mode, scale in (("sync", 7.5), ("fixed", 1.0), ("fixed", 3.0)):
        unet = PointTeacher()
        teacher = toy_teacher(unet, cfg_mode=mode, guidance_scale=scale, steps_per_window=5)
        ends[mode, scale] = teacher.solve(z, teacher.geometry.rows(torch.zeros(2, dtype=torch.long)), prompts)
        assert len(unet.calls) == 5
        told = unet.calls[0][1].tolist()
        assert sorted(told) == ([0.0, 1.0] if mode == "sync" or scale == 1.0 else [0.0, 0.0, 0.0, 1.0])
        assert unet.calls[0][0].tolist()[0] == 999
    assert torch.equal(ends["sync", 7.5], ends["fixed", 1.0])
    moved = (ends["fixed", 3.0] - ends["sync", 7.5]).flatten(1).mean(1)
    assert float(moved[0]) > 0.1  # guided further to the prompt's brighter picture
    assert abs(float(moved[1])) < 1e-5  # from the empty prompt to itself


def test_a_v_prediction_teacher_gives_the_same_windows() -> None:
    """The exact v of one picture: sqrt(abar) eps - sqrt(1 - abar) x0."""

    class PointV(PointTeacher):
        def __call__(
            self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
        ) -> tuple[Tensor]:
            eps = super().__call__(sample, timestep, encoder_hidden_states, return_dict)[0]
            alpha = self._alphas[timestep.long()][:, None, None, None]
            return (alpha.sqrt() * eps - (1 - alpha).sqrt() * 0.5,)

    z = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    ends = []
    for unet, kind in ((PointTeacher(), "epsilon"), (PointV(), "v_prediction")):
        teacher = toy_teacher(unet, prediction_type=kind, steps_per_window=5)
        ends.append(teacher.solve(z, teacher.geometry.rows(torch.arange(4)), PlainEncoder().conditioning([0] * 4)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)


def _rows(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value)[:, None, None, None]


def test_huber_is_linear_beyond_its_bound_and_reciprocal_weights_have_a_mean_of_one() -> None:
    output, target = torch.tensor([0.2, 3.0])[:, None, None, None], torch.zeros(2, 1, 1, 1)
    rows = row_losses(output, target, LossConfig(kind="huber", huber_c=0.5))
    assert rows.tolist() == pytest.approx([0.5 * 0.04, 0.5 * (3.0 - 0.25)])
    t, geometry = torch.linspace(0, 1, 100_001), WindowGeometry(WindowConfig(), SCHEDULE)
    window = geometry.rows(torch.zeros(len(t), dtype=torch.long))
    weights = row_weights(window, t, "ddim_eps", LossConfig(weighting="reciprocal"))
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-3)
    assert [float(weights[i]) for i in (0, -1)] == pytest.approx([1 / (1 + math.log(10)), 10 / (1 + math.log(10))])
