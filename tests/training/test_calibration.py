"""Theta is fitted to the latents of a teacher: a known one is found, and the pipeline is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perflow_blocks.demo import perflow_pipeline
from perflow_blocks.training.calibration import calibrate_theta

pytestmark = pytest.mark.behaviour

KNOWN = [[0.02, -0.01], [0.03, 0.01], [-0.04, 0.05], [0.01, -0.06]]
PROMPTS = ["a red star", "a blue ring on a white background", "a small heart"]


class Teacher:
    """Draws what the student would draw with a theta that is known."""

    def __init__(self) -> None:
        self.pipe = perflow_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.update_components(theta=KNOWN)
        self.unet = self.pipe.unet
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompt: list[str], latents: torch.Tensor, **settings: Any) -> Any:
        self.calls.append(settings)
        return self.pipe(prompt=prompt, latents=latents, num_inference_steps=4, output_type="latent")


def test_a_known_theta_is_found_and_the_scheduler_left_as_it_was() -> None:
    """By what it draws on another prompt: corrections of neighbouring windows can stand in for one another."""
    pipe, teacher = perflow_pipeline(), Teacher()
    pipe.set_progress_bar_config(disable=True)
    theta = calibrate_theta(pipe, teacher, PROMPTS, 4, batch_size=2, iterations=6, guidance_scale=3.0)
    call: dict[str, Any] = {
        "prompt": ["a green cross"],
        "latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)),
    }
    wanted, drawn = teacher.pipe(**call, output_type="latent").images, []
    for fitted in (None, theta):
        pipe.update_components(theta=fitted)
        drawn.append(float((pipe(**call, output_type="latent").images - wanted).norm()))
    assert drawn[1] < 0.15 * drawn[0], drawn
    pipe.update_components(theta=None)
    pipe(**call)
    assert teacher.calls == [{"num_inference_steps": 50, "guidance_scale": 3.0, "output_type": "latent"}] * 2
    assert pipe.scheduler.config.theta is None


@pytest.mark.parametrize(("prompts", "iterations"), [([], 3), (PROMPTS, 0)])
def test_nothing_to_fit_is_refused(prompts: list[str], iterations: int) -> None:
    rule = f"{len(prompts)} prompts, iterations={iterations} and batch_size=8 must all be at least 1"
    with pytest.raises(ValueError, match=rule):
        calibrate_theta(None, None, prompts, 4, iterations=iterations)
