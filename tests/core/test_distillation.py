"""The student's targets: exact on straight paths, right in sign and scale, weighted by their effect on the image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perflow_blocks.core.distillation import draw_times, endpoint_weight, make_student_example, window_endpoint
from perflow_blocks.core.noise_schedule import make_alphas_cumprod
from perflow_blocks.core.parameterization import PREDICTION_TYPES, WindowAlpha, window_alpha, window_table
from perflow_blocks.core.windows import TimeWindows

WINDOWS = TimeWindows.equal(4)
TABLE = window_table(WINDOWS, make_alphas_cumprod())
each_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def rows(*starts: float) -> WindowAlpha:
    return window_alpha(WINDOWS, TABLE, torch.tensor(starts, dtype=torch.float64))


def pair(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_start, z_end = torch.randn(2, batch, 4, 3, 3, generator=generator, dtype=torch.float64)
    return z_start, z_end


@each_type
def test_a_student_that_follows_the_target_ends_where_the_teacher_did(prediction_type: str) -> None:
    window = rows(1.0, 0.75, 0.5, 0.25)
    z_start, z_end = pair(4)
    for share in (0.0, 0.3, 0.9):
        t = window.start + share * (window.end - window.start)
        example = make_student_example(z_start, z_end, torch.as_tensor(t), window, prediction_type)
        assert torch.equal(example.timestep, 1000 * torch.as_tensor(t))
        reached = window_endpoint(example.sample, example.target, window, prediction_type, t)
        torch.testing.assert_close(reached, z_end)


@each_type
def test_outputs_between_staying_and_the_target_lead_as_far_along_the_line(prediction_type: str) -> None:
    """The share w of the way to the target ends at z_s + w (z_e - z_s): with the wrong sign it would lead back."""
    window = rows(0.75)
    z_start, z_end = pair(1)
    t = torch.tensor([0.75], dtype=torch.float64)
    aim = make_student_example(z_start, z_end, t, window, prediction_type)
    still = make_student_example(z_start, z_start, t, window, prediction_type).target
    for w in (-1.0, 0.5, 3.0):
        reached = window_endpoint(aim.sample, still + w * (aim.target - still), window, prediction_type, t)
        torch.testing.assert_close(reached, z_start + w * (z_end - z_start))


@each_type
def test_weights_turn_output_errors_into_errors_of_the_image(prediction_type: str) -> None:
    window = rows(1.0, 0.75, 0.5, 0.25)
    sample, output = pair(4)
    nudged = output + 0.01
    ends = [window_endpoint(sample, o, window, prediction_type) for o in (output, nudged)]
    image_error = (ends[1] - ends[0]).square().flatten(1).mean(1) / torch.as_tensor(window.alpha_end)
    weight = endpoint_weight(window, prediction_type, maximum=1e9)
    torch.testing.assert_close(image_error, weight * 0.01**2)
    assert float(endpoint_weight(window, prediction_type, maximum=0.01).max()) <= 0.01


def test_times_lie_in_their_window_and_often_at_its_start() -> None:
    window = rows(*[0.75] * 1000)
    t = draw_times(window, torch.rand(1000, generator=torch.Generator().manual_seed(0)), start_share=0.4)
    assert float(t.max()) == 0.75 and float(t.min()) > 0.5
    assert float((t == 0.75).float().mean()) == pytest.approx(0.4, abs=0.05)
    assert float(t[t < 0.75].mean()) == pytest.approx(0.625, abs=0.02)
