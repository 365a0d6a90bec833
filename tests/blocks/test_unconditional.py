"""Unconditional models: the preset against a plain loop, mistakes, saving, a delta, and the blocks one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from perflow_blocks import PeRFlowModularPipeline, PeRFlowScheduler, PeRFlowUnconditionalBlocks, extract_delta
from perflow_blocks.blocks import unconditional
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing import check_block, tiny_unconditional_unet
from tests.blocks.conftest import guard_against_reads, poison
from tests.conftest import count_unet_calls, generator, watch_models

pytestmark = pytest.mark.behaviour

NOISE = torch.randn(2, 3, 16, 16, generator=generator(5))


def make() -> Any:
    """As of a classic pipeline, whose models are shared."""
    pipe = PeRFlowModularPipeline.from_pipe(DDPMPipeline(tiny_unconditional_unet(), DDPMScheduler()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **inputs: Any) -> Any:
    return pipe(**{"latents": NOISE, "output_type": "latent", "output": "images", **inputs})


@torch.no_grad()
def by_hand(steps: int, seed: int = 0, **settings: Any) -> Tensor:
    unet = tiny_unconditional_unet(seed)
    scheduler = PeRFlowScheduler.from_scheduler(DDPMScheduler(), **settings)
    scheduler.set_timesteps(steps)
    sample = NOISE
    for t in scheduler.timesteps:
        sample = scheduler.step(unet(sample, t).sample, t, sample).prev_sample
    return sample


@pytest.mark.parametrize("prediction_type", ["ddim_eps", "velocity"])
def test_the_preset_is_the_plain_loop_with_one_call_a_step(prediction_type: str) -> None:
    pipe = make()
    pipe.update_components(prediction_type=prediction_type)
    calls = count_unet_calls(pipe)
    guard_against_reads(pipe)
    drawn, wanted = draw(pipe, num_inference_steps=7), by_hand(7, prediction_type=prediction_type)
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4 * wanted.std().item())
    assert calls == [2] * 7


def test_images_of_every_type_from_noise_that_is_drawn() -> None:
    pipe = make()
    call = {"num_inference_steps": 4, "latents": None}
    both = draw(pipe, **call, batch_size=2, generator=[generator(1), generator(2)])
    scale = 1e-4 * both.std().item()
    for seed, one in ((1, both[:1]), (2, both[1:])):
        torch.testing.assert_close(draw(pipe, **call, generator=generator(seed)), one, rtol=0, atol=scale)
    pixels = draw(pipe, output_type="pt")
    torch.testing.assert_close(pixels, (draw(pipe) / 2 + 0.5).clamp(0, 1))
    assert draw(pipe, output_type="np").shape == (2, 16, 16, 3)
    assert [image.size for image in draw(pipe, latents=NOISE[..., :8], output_type="pil")] == [(8, 16)] * 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"batch_size": 3}, r"latents has shape \(2, 3, 16, 16\); it must be \(3, 3, height, width\)"),
        ({"latents": NOISE[:, :1]}, r"it must be \(images, 3, height, width\)"),
        ({"generator": [generator()]}, "generator holds 1 generators for 2 images; pass 2, or one"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer of at least 1"),
        ({"output_type": "image"}, "output_type='image' must be one of pil, np, pt, latent"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore' must be one of raise, fallback"),
        ({"prompt": "a star"}, "prompt is not an input of this pipeline"),
        ({"guidance_scale": 2.0}, "guidance_scale is not an input of this pipeline"),
    ],
)
def test_mistakes_are_told_in_a_line_before_the_model_runs(inputs: dict[str, Any], message: str) -> None:
    pipe = make()
    ran, _ = watch_models(pipe)
    with pytest.raises(ValueError, match=message) as caught:
        draw(pipe, **inputs)
    assert ran == [] and "\n" not in str(caught.value)


def test_a_model_that_is_not_loaded_is_told() -> None:
    with pytest.raises(ValueError, match="unet not loaded"):
        PeRFlowUnconditionalBlocks().init_pipeline()()


def test_pixels_that_are_not_finite_are_an_error_or_drawn_again() -> None:
    pipe, half = make(), make()
    poison(pipe.unet, 500, image=1)
    with pytest.raises(ValueError, match=r"not finite in torch.float32 for images\[1\] of 2"):
        draw(pipe, num_inference_steps=4)
    attention = half.unet.mid_block.attentions[0]
    attention.to_v.weight.data *= 2.0**17
    attention.to_out[0].weight.data *= 2.0**-17
    half.to(torch.float16)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        draw(half, num_inference_steps=4)
    assert draw(half, num_inference_steps=4, on_nonfinite="fallback").isfinite().all()


def test_a_delta_gives_the_student_its_windows_and_comes_back_from_a_saved_pipeline(tmp_path: Path) -> None:
    recipe = DeltaRecipe(prediction_type="diff_eps", num_time_windows=2, num_inference_steps=3)
    weights = extract_delta(tiny_unconditional_unet(1), tiny_unconditional_unet(0))
    save_delta(weights, delta := tmp_path / "delta.safetensors", recipe, dtype=torch.float32)
    pipe = make()
    student, base = draw(pipe, delta=delta), by_hand(6)
    wanted = by_hand(3, seed=1, prediction_type="diff_eps", num_time_windows=2)
    torch.testing.assert_close(student, wanted, rtol=0, atol=1e-4 * wanted.std().item())
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = PeRFlowModularPipeline.from_pretrained(tmp_path / "saved")
    again.load_components()
    assert type(again._blocks) is PeRFlowUnconditionalBlocks and again.components.keys() == {"unet", "scheduler"}
    assert torch.equal(draw(again), student)
    torch.testing.assert_close(draw(pipe, delta=False), base, rtol=0, atol=1e-4 * base.std().item())


@pytest.mark.parametrize("name", [name for name in dir(unconditional) if name.startswith("PeRFlowUnconditional")])
def test_every_block_keeps_its_contract(name: str) -> None:
    block = getattr(unconditional, name)()
    inputs = {"latents": NOISE} if "latents" in block.required_inputs else {}
    check_block(block, components={"unet": tiny_unconditional_unet()}, inputs=inputs)
