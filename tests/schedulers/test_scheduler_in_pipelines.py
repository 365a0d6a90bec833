"""PeRFlowScheduler as the scheduler of diffusers' own pipelines, on tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from perflow_blocks.schedulers import PeRFlowScheduler
from perflow_blocks.testing.tiny import IMAGE_SIZE, LATENT_SIZE, tiny_sd_components, tiny_sdxl_components

pytestmark = pytest.mark.behaviour

TEXT_TO_IMAGE = [
    pytest.param(StableDiffusionPipeline, tiny_sd_components, "diff_eps", id="sd"),
    pytest.param(StableDiffusionXLPipeline, tiny_sdxl_components, "ddim_eps", id="sdxl"),
]
IMAGE_TO_IMAGE = [
    pytest.param(StableDiffusionImg2ImgPipeline, tiny_sd_components, "velocity", id="sd"),
    pytest.param(StableDiffusionXLImg2ImgPipeline, tiny_sdxl_components, "ddim_eps", id="sdxl"),
]


def make_pipeline(pipeline_type: Any, components: Any, prediction_type: str) -> Any:
    pipeline = pipeline_type(**components(PeRFlowScheduler(prediction_type=prediction_type)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline, **settings: Any) -> tuple[Tensor, list[int]]:
    """Latents (2, 4, 16, 16) and the timesteps that the UNet was given."""
    asked: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: asked.append(int(args[1])))
    try:
        latents = pipeline(
            ["a red star", "a blue square"],
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **settings,
        ).images
    finally:
        hook.remove()
    return latents, asked


@pytest.mark.parametrize(("pipeline_type", "components", "prediction_type"), TEXT_TO_IMAGE)
def test_text_to_image_is_the_loop_written_out(pipeline_type: Any, components: Any, prediction_type: str) -> None:
    pipeline = make_pipeline(pipeline_type, components, prediction_type)
    noise = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(1))
    outputs: list[Tensor] = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    latents, asked = draw(pipeline, num_inference_steps=6, latents=noise, height=IMAGE_SIZE, width=IMAGE_SIZE)
    hook.remove()
    assert asked == [1000, 875, 750, 625, 500, 250]
    expected = noise
    for timestep, output in zip(asked, outputs, strict=True):
        uncond, cond = output.chunk(2)
        expected = pipeline.scheduler.step(uncond + 2.0 * (cond - uncond), timestep, expected).prev_sample
    torch.testing.assert_close(latents, expected)
    assert bool(latents.isfinite().all())


@pytest.mark.parametrize(("pipeline_type", "components", "prediction_type"), TEXT_TO_IMAGE)
def test_text_to_image_takes_custom_timesteps(pipeline_type: Any, components: Any, prediction_type: str) -> None:
    pipeline = make_pipeline(pipeline_type, components, prediction_type)
    timesteps = [1000, 900, 750, 500, 250, 100]
    _, asked = draw(pipeline, timesteps=timesteps, height=IMAGE_SIZE, width=IMAGE_SIZE)
    assert asked == timesteps


@pytest.mark.parametrize(("pipeline_type", "components", "prediction_type"), TEXT_TO_IMAGE)
def test_images_are_decoded(pipeline_type: Any, components: Any, prediction_type: str) -> None:
    pipeline = make_pipeline(pipeline_type, components, prediction_type)
    images = pipeline("a red star", num_inference_steps=4, height=IMAGE_SIZE, width=IMAGE_SIZE).images
    assert images[0].size == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize(("pipeline_type", "components", "prediction_type"), IMAGE_TO_IMAGE)
@pytest.mark.parametrize(
    ("strength", "asked"), [(0.5, [500, 375, 250, 125]), (0.4, [375, 250, 125]), (1.0, list(range(1000, 0, -125)))]
)
def test_image_to_image_starts_where_strength_says(
    pipeline_type: Any, components: Any, prediction_type: str, strength: float, asked: list[int]
) -> None:
    pipeline = make_pipeline(pipeline_type, components, prediction_type)
    image = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    latents, timesteps = draw(pipeline, image=image, num_inference_steps=8, strength=strength)
    assert timesteps == asked
    assert latents.shape == (2, 4, LATENT_SIZE, LATENT_SIZE)
    assert bool(latents.isfinite().all())


def test_a_saved_pipeline_finds_its_scheduler_settings(tmp_path: Any) -> None:
    scheduler = PeRFlowScheduler(prediction_type="velocity", num_time_windows=2)
    scheduler.save_pretrained(tmp_path / "scheduler")
    again = PeRFlowScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    pipeline = StableDiffusionXLPipeline(**tiny_sdxl_components(again))
    pipeline.set_progress_bar_config(disable=True)
    _, asked = draw(pipeline, num_inference_steps=2, height=IMAGE_SIZE, width=IMAGE_SIZE)
    assert asked == [1000, 500]
