"""The ControlNet loop: one call of ControlNet and UNet a step, equal to diffusers' loop of two, and its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoGuidance, ClassifierFreeGuidance, MultiControlNetModel
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLControlNetLoopDenoiser

from perflow_blocks.blocks.controlnet import PeRFlowControlNetDenoiseStep, PeRFlowControlNetLoopDenoiser
from perflow_blocks.testing.tiny import tiny_controlnet, tiny_controlnet_union
from perflow_blocks.testing.tiny import tiny_image as image
from tests.blocks.conftest import layers
from tests.conftest import count_unet_calls, generator, make_pipeline, run

pytestmark = pytest.mark.behaviour

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one": (tiny_controlnet, {"control_image": image(3)}),
    "several": (
        lambda: MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)]),
        {"control_image": [image(3), image(4)], "controlnet_conditioning_scale": [0.5, 1.5]},
    ),
    "union": (tiny_controlnet_union, {"control_image": image(3), "control_mode": 1}),
    "union_of_two": (tiny_controlnet_union, {"control_image": [image(3), image(4)], "control_mode": [2, 0]}),
}


def count_controlnet_calls(pipe: Any) -> list[int]:
    """The batch sizes of the ControlNet's calls, appended to as they happen."""
    batches: list[int] = []
    pipe.controlnet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    return batches


def stage(controlnet: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """A pipeline, and what its loop starts with for two prompts, with what the stock denoiser reads besides."""
    pipe = make_pipeline(controlnet=controlnet)
    state = pipe(prompt=["a star", "a ring"], negative_prompt="a square", output_type="latent", **inputs)
    block_state = PeRFlowControlNetDenoiseStep().get_block_state(state)
    block_state.latents = block_state.scaled_latents = torch.randn(2, 4, 16, 16, generator=generator(7))
    names = ("control_type", "control_type_idx") if "control_mode" in inputs else ()
    block_state.controlnet_kwargs = {name: block_state[name] for name in names}
    return pipe, block_state


@pytest.mark.parametrize(
    ("kind", "guess_mode", "guider"),
    [
        *((kind, True, "cfg") for kind in KINDS),
        ("several", False, "cfg"),
        ("union", False, "cfg"),
        ("one", True, "auto"),
    ],
)
def test_one_call_equals_the_stock_calls(kind: str, guess_mode: bool, guider: str) -> None:
    make, inputs = KINDS[kind]
    pipe, block_state = stage(make(), inputs)
    block_state.guess_mode = guess_mode
    calls, unet_calls, predictions = count_controlnet_calls(pipe), count_unet_calls(pipe), []
    for denoiser in (PeRFlowControlNetLoopDenoiser(), StableDiffusionXLControlNetLoopDenoiser()):
        pipe.update_components(
            guider=ClassifierFreeGuidance(3.0)
            if guider == "cfg"
            else AutoGuidance(3.0, auto_guidance_config=layers(), dropout=None)
        )
        block_state.guider = pipe.guider
        denoiser(pipe, block_state, i=2, t=block_state.timesteps[2])
        predictions.append(block_state.noise_pred)
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-5)
    if guider == "cfg":
        assert unet_calls == [4, 2, 2]
        rows = 2 if guess_mode else 4
        ours = [rows // 2] * 2 if "union" in kind else [rows]  # a union sees one image at a time
        assert calls == ours + ([2] if guess_mode else [2, 2])


@pytest.mark.parametrize("kind", ["several", "union_of_two"])
def test_scale_weighs_and_zero_switches_off(kind: str) -> None:
    make, inputs = KINDS[kind]
    inputs = {name: value for name, value in inputs.items() if name != "controlnet_conditioning_scale"}
    pipe = make_pipeline(controlnet=make())
    calls = count_controlnet_calls(pipe)
    plain = run(pipe, num_inference_steps=4)
    off = run(pipe, num_inference_steps=4, controlnet_conditioning_scale=0, **inputs)
    assert calls == []
    assert torch.equal(off, plain)
    half, full = (run(pipe, num_inference_steps=4, controlnet_conditioning_scale=s, **inputs) for s in (0.5, 1.0))
    assert calls == [2] * 8
    assert 1e-3 < (half - plain).abs().max() < (full - plain).abs().max()


@pytest.mark.parametrize(("start", "end", "steps_run"), [(0.0, 0.5, 2), (0.25, 0.75, 2), (0.0, 0.1, 0)])
def test_the_controlnet_runs_in_its_share_of_the_steps_only(start: float, end: float, steps_run: int) -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet())
    calls = count_controlnet_calls(pipe)
    inputs = {"control_guidance_start": start, "control_guidance_end": end}
    run(pipe, num_inference_steps=4, control_image=image(3), **inputs)
    assert calls == [2] * steps_run


def test_each_of_several_controlnets_runs_in_its_own_share_of_the_steps() -> None:
    make, inputs = KINDS["several"]
    pipe, scales = make_pipeline(controlnet=make()), []
    pipe.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: scales.append(kwargs["conditioning_scale"]), with_kwargs=True
    )
    shares = {"control_guidance_start": [0.0, 0.25], "control_guidance_end": [0.5, 1.0]}
    run(pipe, num_inference_steps=4, **shares, **inputs)
    assert scales == [[0.5, 0.0], [0.5, 1.5], [0.0, 1.5], [0.0, 1.5]]


def test_a_list_of_control_images_is_not_written_into() -> None:
    given = [image(3), image(4)]
    kept = list(given)
    pipe = make_pipeline(controlnet=tiny_controlnet_union())
    for _ in range(2):
        run(pipe, num_inference_steps=4, control_image=given, control_mode=[2, 0])
    assert given == kept


def test_images_of_a_batch_do_not_see_one_another_in_a_union() -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet_union())
    prompts, images = ["a star", "a ring"], [image(3), image(4)]
    together = run(
        pipe, prompt=prompts, control_image=[images], control_mode=1, generator=[generator(0), generator(1)]
    )
    for row in range(2):
        inputs = {"prompt": prompts[row], "control_image": [images[row]], "generator": [generator(row)]}
        alone = run(pipe, control_mode=1, **inputs)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_several_prompts_and_images_share_or_have_their_control_image() -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet())
    prompts, images = ["a star", "a ring"], [image(3), image(4)]
    together = run(
        pipe,
        prompt=prompts,
        control_image=images,
        num_images_per_prompt=2,
        generator=[generator(seed) for seed in range(4)],
    )
    for row in range(4):
        inputs = {"prompt": prompts[row // 2], "control_image": images[row // 2], "generator": [generator(row)]}
        torch.testing.assert_close(together[row : row + 1], run(pipe, **inputs), rtol=1e-4, atol=1e-4)
