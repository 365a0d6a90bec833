"""What callers of each workflow get wrong: one clear line, before any model runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiControlNetModel
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks

from perflow_blocks.blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.testing.tiny import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_feature_extractor,
    tiny_image_encoder,
    tiny_inpainting_unet,
    tiny_mask,
    tiny_picture,
)
from tests.conftest import generator, make_pipeline, refusal, run

pytestmark = pytest.mark.behaviour

PICTURE, MASK = tiny_picture(1), tiny_mask()
LATENTS = torch.zeros(1, 4, 16, 16)
HOLE = torch.ones(1, 1, 16, 16)
WIDTH = 24
"""Of the tiny IP-Adapters' image embeddings."""

IP_EMBEDS = torch.zeros(1, 1, WIDTH)


def pipeline(kind: str) -> Any:
    match kind:
        case "controlnet":
            return make_pipeline(controlnet=tiny_controlnet())
        case "several":
            return make_pipeline(controlnet=MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)]))
        case "union":
            return make_pipeline(controlnet=tiny_controlnet_union())
        case "nine":
            return make_pipeline(unet=tiny_inpainting_unet())
        case "ip_adapter":
            pipe = make_pipeline(image_encoder=tiny_image_encoder())
            pipe.feature_extractor = tiny_feature_extractor()
            load_tiny_ip_adapter(pipe, 2)
            return pipe
    return make_pipeline()


IMAGE = {"image": PICTURE}
INPAINT = {"image": PICTURE, "mask_image": MASK}
CONTROL = {"control_image": PICTURE}
TWO_CONTROLS = {"control_image": [PICTURE] * 2}
EMBEDS = {
    "prompt": None,
    "prompt_embeds": torch.zeros(1, 16, 32),
    "pooled_prompt_embeds": torch.zeros(1, 16),
}
ADAPTERS = {"ip_adapter_embeds": [IP_EMBEDS] * 2, "negative_ip_adapter_embeds": [IP_EMBEDS] * 2}
MISTAKES: list[tuple[str, dict[str, Any], str, str]] = [
    *[("plain", {**IMAGE, "strength": value}, "strength", f"{value!r}") for value in (0, 1.5, -0.1, math.nan, "0.5")],
    ("plain", {"strength": 0.5}, "strength", "image"),
    ("plain", {"image": "star.png"}, "image", "str"),
    ("plain", {"image": []}, "image", "empty"),
    ("plain", {"image": [PICTURE] * 3}, "image", "3"),
    ("plain", {"image": LATENTS}, "image", "image_latents"),
    ("plain", {**IMAGE, "image_latents": LATENTS}, "image", "image_latents"),
    ("plain", {"image_latents": LATENTS[0]}, "image_latents", "(4, 16, 16)"),
    ("plain", {**IMAGE, "noising": "line"}, "noising", "'line'"),
    ("plain", {"on_nonfinite": "ignore"}, "on_nonfinite", "'ignore'"),
    ("plain", {"output_type": "jpg"}, "output_type", "'jpg'"),
    ("plain", {"mask_image": MASK}, "mask_image", "image"),
    ("plain", {"image": PICTURE, "mask_image": tiny_mask((32, 24))}, "mask_image", "32x24"),
    ("plain", {"image": PICTURE, "mask_image": np.zeros((16, 32))}, "mask_image", "32x16"),
    ("plain", {"image_latents": LATENTS, "mask": HOLE[..., :8]}, "mask", "8x16"),
    ("plain", {"image_latents": LATENTS, "mask": LATENTS}, "mask", "(1, 4, 16, 16)"),
    ("plain", {"image_latents": LATENTS, "mask_image": MASK}, "mask_image", "image"),
    ("plain", {**IMAGE, "mask": HOLE}, "mask", "image_latents"),
    ("plain", {"image": PICTURE, "mask_image": [MASK] * 2}, "mask_image", "2"),
    ("plain", {"image": [PICTURE], "mask_image": MASK, "padding_mask_crop": 8}, "padding_mask_crop", "image"),
    ("plain", {"denoising_end": 1.2}, "denoising_end", "1.2"),
    ("plain", {"denoising_end": 0}, "denoising_end", "0"),
    ("plain", {"image_latents": LATENTS, "denoising_start": 1.0}, "denoising_start", "1.0"),
    (
        "plain",
        {"image_latents": LATENTS, "denoising_start": 0.5, "denoising_end": 0.4},
        "denoising_end=0.4",
        "denoising_start=0.5",
    ),
    ("plain", {"denoising_start": 0.5}, "denoising_start", "image_latents"),
    ("plain", {**INPAINT, "denoising_start": 0.5}, "denoising_start", "latents"),
    ("plain", {**IMAGE, "generator": [generator()] * 3}, "generator", "3"),
    ("plain", {**INPAINT, "generator": [generator()] * 2}, "generator", "2"),
    ("plain", {"generator": (generator(),)}, "generator", "tuple"),
    ("plain", {"generator": [7]}, "generator", "int"),
    ("plain", {**IMAGE, "latents": LATENTS[:, :3]}, "latents", "(1, 3, 16, 16)"),
    ("plain", {"latents": LATENTS.expand(2, -1, -1, -1)}, "latents", "(2, 4, 16, 16)"),
    ("plain", {"latents": [LATENTS]}, "latents", "list"),
    ("plain", {"latents": LATENTS, "height": 48}, "height=48", "32"),
    ("plain", {"latents": LATENTS, "width": 16}, "width=16", "32"),
    ("plain", {"image_latents": LATENTS, "height": 64}, "height=64", "32"),
    ("plain", {"latents": LATENTS.half()}, "latents", "torch.float16"),
    ("plain", {"height": 33}, "height", "33"),
    ("plain", {"original_size": [32, 32]}, "original_size", "[32, 32]"),
    ("plain", {"target_size": 32}, "target_size", "32"),
    ("plain", {"negative_target_size": (32, 32)}, "negative_original_size", "negative_target_size"),
    *[
        ("plain", {name: value}, name, f"{value!r}")
        for name, value in {
            "num_inference_steps": 0,
            "num_images_per_prompt": 1.5,
            "width": 0,
            "height": "32",
            "clip_skip": -1,
        }.items()
    ],
    ("plain", {"clip_skip": True}, "clip_skip", "True"),
    ("plain", {"clip_skip": 100}, "clip_skip", "100"),
    ("plain", {"cross_attention_kwargs": 0.5}, "cross_attention_kwargs", "0.5"),
    ("plain", {"prompt": None}, "prompt", "missing"),
    ("plain", {"prompt": 7}, "prompt", "7"),
    ("plain", {"prompt": []}, "prompt", "[]"),
    ("plain", {"prompt": ["a", 3]}, "prompt", "['a', 3]"),
    ("plain", {"negative_prompt": ["a", "b"]}, "negative_prompt", "2"),
    ("plain", {"prompt": ["a", "b"], "prompt_2": "a"}, "prompt_2", "1"),
    ("plain", {"negative_prompt_2": "a"}, "negative_prompt_2", "negative_prompt"),
    ("plain", {"prompt_embeds": LATENTS}, "prompt", "prompt_embeds"),
    ("plain", {**EMBEDS, "prompt_embeds": [LATENTS]}, "prompt_embeds", "list"),
    ("plain", {**EMBEDS, "pooled_prompt_embeds": None}, "prompt_embeds", "pooled_prompt_embeds"),
    ("plain", {**EMBEDS, "negative_prompt": "a"}, "negative_prompt", "prompt_embeds"),
    ("plain", {**EMBEDS, "negative_prompt_embeds": torch.zeros(1, 16, 32)}, "negative_prompt_embeds", "pooled"),
    ("plain", {**EMBEDS, "prompt_embeds": torch.zeros(16, 32)}, "prompt_embeds", "(16, 32)"),
    ("plain", {**EMBEDS, "prompt_embeds": torch.zeros(1, 16, 24)}, "(1, 16, 24)", "(prompts, tokens, 32)"),
    ("plain", {**EMBEDS, "pooled_prompt_embeds": torch.zeros(1, 1, 16)}, "pooled_prompt_embeds", "(1, 1, 16)"),
    ("plain", {**EMBEDS, "pooled_prompt_embeds": torch.zeros(1, 32)}, "pooled_prompt_embeds has shape (1, 32)", "16)"),
    ("plain", {**EMBEDS, "pooled_prompt_embeds": torch.zeros(2, 16)}, "pooled_prompt_embeds", "(2, 16)"),
    (
        "plain",
        {
            **EMBEDS,
            "negative_prompt_embeds": torch.zeros(1, 8, 32),
            "negative_pooled_prompt_embeds": torch.zeros(1, 16),
        },
        "negative_prompt_embeds has shape (1, 8, 32)",
        "(1, 16, 32)",
    ),
    ("plain", {**CONTROL}, "controlnet", "not loaded"),
    ("plain", {"control_mode": 1}, "control_mode", "control_image"),
    ("plain", {"ip_adapter_image": PICTURE}, "image_encoder", "not loaded"),
    ("plain", {"ip_adapter_embeds": [LATENTS]}, "ip_adapter_embeds", "load_ip_adapter"),
    ("controlnet", {"controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale", "control_image"),
    ("controlnet", TWO_CONTROLS, "control_image", "2"),
    ("controlnet", {**CONTROL, "control_mode": 1}, "control_mode", "ControlNetModel"),
    *[
        (
            "controlnet",
            {**CONTROL, "control_guidance_start": start, "control_guidance_end": end},
            f"{start!r}",
            f"{end!r}",
        )
        for start, end in ((0.8, 0.5), (0.5, 0.5), (0.0, 1.5))
    ],
    ("controlnet", {**CONTROL, "controlnet_conditioning_scale": [1.0, 0.1]}, "_scale", "[1.0, 0.1]"),
    ("controlnet", {**CONTROL, "control_guidance_start": [0.0, 0.5]}, "control_guidance_start", "[0.0, 0.5]"),
    ("controlnet", {**CONTROL, "control_guidance_start": "0.2"}, "control_guidance_start", "'0.2'"),
    ("controlnet", {"control_image": np.zeros((32, 32, 3), np.uint8)}, "control_image", "uint8"),
    ("controlnet", {"control_image": "edges.png"}, "control_image", "str"),
    ("controlnet", {"control_image": []}, "control_image", "empty"),
    ("controlnet", {"control_image": (PICTURE, PICTURE)}, "control_image", "tuple"),
    ("several", {"control_image": [PICTURE, [PICTURE] * 3]}, "control_image", "3"),
    (
        "several",
        {**TWO_CONTROLS, "control_guidance_start": [0.5, 0.5], "control_guidance_end": [1.0, 0.2]},
        "control_guidance_start=0.5",
        "control_guidance_end=0.2",
    ),
    ("several", CONTROL, "control_image", "2"),
    ("several", {"control_image": [PICTURE] * 3}, "control_image", "3"),
    ("several", {**TWO_CONTROLS, "controlnet_conditioning_scale": [1.0]}, "controlnet_conditioning_scale", "[1.0]"),
    ("union", CONTROL, "control_mode", "missing"),
    ("union", {**CONTROL, "control_mode": [0, 1]}, "control_mode", "2"),
    ("union", {**CONTROL, "control_mode": 99}, "control_mode", "99"),
    ("union", {**CONTROL, "control_mode": (1,)}, "control_mode", "(1,)"),
    ("union", {**CONTROL, "control_mode": 1, "control_guidance_end": [0.5]}, "control_guidance_end", "[0.5]"),
    ("union", {"control_image": [np.zeros((32, 32))], "control_mode": [1]}, "control_image", "(32, 32)"),
    ("union", {**TWO_CONTROLS, "control_mode": [0, 1], "controlnet_conditioning_scale": [1.0]}, "_scale", "[1.0]"),
    ("nine", {}, "mask_image", "9"),
    ("nine", IMAGE, "mask_image", "9"),
    ("ip_adapter", {}, "ip_adapter_image", "2"),
    ("ip_adapter", {"ip_adapter_image": PICTURE}, "ip_adapter_image", "1"),
    ("ip_adapter", {"ip_adapter_image": [PICTURE] * 3}, "ip_adapter_image", "3"),
    ("ip_adapter", {**ADAPTERS, "ip_adapter_embeds": [IP_EMBEDS]}, "ip_adapter_embeds", "1"),
    ("ip_adapter", {**ADAPTERS, "negative_ip_adapter_embeds": [IP_EMBEDS]}, "negative_ip_adapter_embeds", "1"),
    ("ip_adapter", {**ADAPTERS, "ip_adapter_embeds": [IP_EMBEDS[0]] * 2}, "ip_adapter_embeds", f"(1, {WIDTH})"),
    ("ip_adapter", {**ADAPTERS, "ip_adapter_embeds": [IP_EMBEDS[..., :5]] * 2}, "(1, 1, 5)", f"(images, 1, {WIDTH})"),
    ("ip_adapter", {"ip_adapter_image": [PICTURE] * 2, **ADAPTERS}, "ip_adapter_image", "ip_adapter_embeds"),
]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {kind: pipeline(kind) for kind in ("plain", "controlnet", "several", "union", "nine", "ip_adapter")}


@pytest.mark.parametrize(
    ("kind", "inputs", "name", "value"), MISTAKES, ids=[f"{k}-{n}-{v}" for k, _, n, v in MISTAKES]
)
def test_an_error_names_the_argument_and_its_value_before_a_model_runs(
    pipelines: dict[str, Any], kind: str, inputs: dict[str, Any], name: str, value: str
) -> None:
    text = refusal(pipelines[kind], **inputs)
    assert name in text
    assert value in text


def test_guidance_needs_negative_embeddings_for_ip_adapters(pipelines: dict[str, Any]) -> None:
    """Whether there is guidance is known after a delta was merged, which may recommend none."""
    embeds = {"ip_adapter_embeds": [IP_EMBEDS] * 2}
    with pytest.raises(ValueError, match="negative_ip_adapter_embeds"):
        pipelines["ip_adapter"](prompt="a star", num_inference_steps=1, **embeds)
    pipelines["ip_adapter"](prompt="a star", num_inference_steps=1, guidance_scale=1.0, **embeds)


def test_a_refiner_is_told_a_score_in_place_of_a_size() -> None:
    pipe = make_pipeline()
    width = pipe.unet.config.addition_time_embed_dim
    pipe.update_components(requires_aesthetics_score=True)
    with pytest.raises(ValueError, match=rf"pooled_prompt_embeds has shape \(1, 16\).*\(1, {16 + width}\)"):
        pipe(**EMBEDS, image=PICTURE)


@pytest.mark.parametrize("name", ["controlnet", "text_encoder_2"])
def test_models_of_another_type_are_named(name: str) -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet())
    getattr(pipe, name).to(torch.bfloat16)
    with pytest.raises(ValueError, match=f"{name} is torch.bfloat16, the UNet torch.float32"):
        pipe(prompt="a star", control_image=PICTURE)


@pytest.mark.parametrize("inputs", [{}, IMAGE, INPAINT, {**INPAINT, "padding_mask_crop": 4}])
def test_a_float32_vae_works_beside_a_bfloat16_unet(inputs: dict[str, Any]) -> None:
    pipe = make_pipeline()
    expected = pipe(prompt="a star", **inputs, generator=generator(), output="images")
    pipe.to(torch.bfloat16)
    pipe.vae.to(torch.float32)
    for _ in range(2):  # the second call finds what the first may have changed
        state = pipe(prompt="a star", **inputs, generator=generator())
        assert pipe.vae.dtype == torch.float32
        error = np.abs(np.asarray(state.get("images")[0], float) - np.asarray(expected[0], float)).mean()
        assert error < 3.0  # of 255


def test_an_encoder_keeps_the_vaes_type_whatever_the_state_holds() -> None:
    pipe = make_pipeline()
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder_2.to(torch.bfloat16)
    state = pipe(prompt="a star", num_inference_steps=1)
    assert state.get("dtype") == torch.bfloat16
    encoder = PeRFlowSDXLAutoBlocks().sub_blocks["vae_encoder"].init_pipeline()
    encoder.update_components(vae=pipe.vae)
    assert encoder(state=state, image=PICTURE, output="image_latents").dtype == torch.float32
    assert pipe.vae.dtype == torch.float32


def test_numbers_of_numpy_are_taken_as_pythons_own() -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet())
    numbers: dict[str, Any] = {
        "num_inference_steps": 4,
        "num_images_per_prompt": 2,
        "height": 32,
        "width": 32,
        "clip_skip": 1,
        "strength": 0.5,
        "denoising_end": 0.75,
        "original_size": (32, 32),
        "crops_coords_top_left": (0, 8),
        "controlnet_conditioning_scale": 0.5,
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
    }

    def of_numpy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(of_numpy(entry) for entry in value)
        return np.int64(value) if isinstance(value, int) else np.float32(value)

    inputs = {"image": PICTURE, **CONTROL, "negative_prompt": "a ring"}
    expected = run(pipe, **inputs, **numbers)
    assert torch.equal(run(pipe, **inputs, **{name: of_numpy(value) for name, value in numbers.items()}), expected)
    plain = run(pipe, timesteps=[1000, 750, 500, 250])
    assert torch.equal(run(pipe, timesteps=[np.int64(t) for t in (1000, 750, 500, 250)]), plain)
    pipe(prompt="a star", **INPAINT, num_inference_steps=1, padding_mask_crop=np.int32(4))


def test_components_that_are_not_loaded_are_named() -> None:
    with pytest.raises(ValueError, match=r"unet.* and vae not loaded"):
        PeRFlowSDXLAutoBlocks().init_pipeline()(prompt="a star")


def test_the_base_model_without_its_first_text_encoder_is_no_refiner() -> None:
    with pytest.raises(ValueError, match="text_encoder and tokenizer"):
        make_pipeline(text_encoder=None, tokenizer=None)(prompt="a star")


def test_what_blocks_put_together_do_not_take_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    parts = PeRFlowSDXLAutoBlocks().get_workflow("text2image").sub_blocks
    make_pipeline(SequentialPipelineBlocks.from_blocks_dict(parts))(prompt="a star", image=PICTURE)
    assert "image is given" in caplog.text
    caplog.clear()
    make_pipeline()(prompt="a star", image=PICTURE, strength=0.3)
    assert "is ignored" not in caplog.text


@pytest.mark.parametrize(
    ("workflow", "missing"),
    [
        ("controlnet_text2image", "control_image"),
        ("image2image", "image"),
        ("ip_adapter_text2image", "ip_adapter_image"),
    ],
)
def test_a_workflow_that_was_taken_out_names_what_it_lacks(workflow: str, missing: str) -> None:
    pipe = make_pipeline(PeRFlowSDXLAutoBlocks().get_workflow(workflow))
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        pipe(prompt="a star")
