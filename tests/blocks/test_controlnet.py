"""The ControlNet loop: one call of ControlNet and UNet a step, equal to diffusers' loop of two, and its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoGuidance, ClassifierFreeGuidance, MultiControlNetModel, SkipLayerGuidance
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLControlNetLoopDenoiser

from perflow_blocks.blocks import PeRFlowControlNetDenoiseStep, PeRFlowControlNetLoopDenoiser
from perflow_blocks.testing.tiny import tiny_controlnet, tiny_controlnet_union, tiny_inpainting_unet, tiny_mask
from perflow_blocks.testing.tiny import tiny_picture as image
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


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guider", ["cfg", "auto"])
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


class ThreeAtOnce(SkipLayerGuidance):
    """Three batches for one call of the model: the third sees other words, and all layers."""

    prepare_models = BaseGuidance.prepare_models
    cleanup_models = BaseGuidance.cleanup_models

    def prepare_inputs(self, data: Any) -> list[Any]:  # as the stock denoiser asks
        return self._change_words(super().prepare_inputs(data), "prompt_embeds")

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return self._change_words(super().prepare_inputs_from_block_state(data, input_fields), "encoder_hidden_states")

    def _change_words(self, batches: list[Any], name: str) -> list[Any]:
        setattr(batches[2], name, -getattr(batches[2], name))
        return batches


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("guider", ["at_once", "in_turn"])
def test_guess_mode_under_three_batches_controls_the_two_conditional_ones(kind: str, guider: str) -> None:
    make, inputs = KINDS[kind]
    pipe, block_state = stage(make(), inputs)
    block_state.guess_mode, predictions = True, []
    for denoiser in (PeRFlowControlNetLoopDenoiser(), StableDiffusionXLControlNetLoopDenoiser()):
        settings = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0, "skip_layer_config": layers()}
        guider_class = ThreeAtOnce if guider == "at_once" else SkipLayerGuidance
        pipe.update_components(guider=guider_class(3.0, 1.5, **settings))
        block_state.guider = pipe.guider
        denoiser(pipe, block_state, i=2, t=block_state.timesteps[2])
        predictions.append(block_state.noise_pred)
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
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


def test_each_of_two_controls_of_a_union_has_its_own_scale() -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet_union())
    inputs = KINDS["union_of_two"][1]
    both, first, second = (
        run(pipe, num_inference_steps=4, controlnet_conditioning_scale=scale, **inputs)
        for scale in ([1.0, 1.0], [1.0, 0.2], [0.2, 1.0])
    )
    assert (both - first).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("start", "end", "steps_run"), [(0.0, 1.0, 4), (0.0, 0.5, 2), (0.5, 1.0, 2), (0.25, 0.75, 2), (0.0, 0.1, 0)]
)
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


def test_the_controlnet_of_a_nine_channel_unet_sees_the_latents_alone() -> None:
    pipe = make_pipeline(unet=tiny_inpainting_unet(), controlnet=tiny_controlnet())
    inputs = {"image": image(1), "mask_image": tiny_mask(), "num_inference_steps": 4}
    first, second = (run(pipe, control_image=image(seed), **inputs) for seed in (3, 4))
    assert (first - second).abs().max() > 1e-3


def test_a_compiled_union_is_known_as_one() -> None:
    pipe, compiled = make_pipeline(controlnet=tiny_controlnet_union()), make_pipeline()
    compiled.register_components(controlnet=torch.compile(tiny_controlnet_union(), backend="eager"))
    inputs = {"control_image": image(3), "control_mode": 1, "num_inference_steps": 4}
    torch.testing.assert_close(run(compiled, **inputs), run(pipe, **inputs), rtol=1e-4, atol=1e-4)


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
