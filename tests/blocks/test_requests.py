"""What callers of each workflow get wrong: one clear line, before any model runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiControlNetModel
from PIL import Image

from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.testing.tiny import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_feature_extractor,
    tiny_image,
    tiny_image_encoder,
    tiny_mask,
)
from tests.conftest import generator, make_pipeline, refusal, run

pytestmark = pytest.mark.behaviour

PICTURE, MASK = tiny_image(1), tiny_mask()
LATENTS = torch.zeros(1, 4, 16, 16)
HOLE = torch.ones(1, 1, 16, 16)
IP_EMBEDS = torch.zeros(1, 1, 24)


def pipeline(kind: str) -> Any:
    match kind:
        case "controlnet":
            return make_pipeline(controlnet=tiny_controlnet())
        case "several":
            return make_pipeline(controlnet=MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)]))
        case "union":
            return make_pipeline(controlnet=tiny_controlnet_union())
        case "ip_adapter":
            pipe = make_pipeline(image_encoder=tiny_image_encoder())
            pipe.feature_extractor = tiny_feature_extractor()
            load_tiny_ip_adapter(pipe, 2)
            return pipe
    return make_pipeline()


IMAGE = {"image": PICTURE}
INPAINT = {"image": PICTURE, "mask_image": MASK}
CROP = {**INPAINT, "padding_mask_crop": 4}
CONTROL = {"control_image": PICTURE}
TWO_CONTROLS = {"control_image": [PICTURE] * 2}
EMBEDS = {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 32), "pooled_prompt_embeds": torch.zeros(1, 16)}
NEGATIVES = {"negative_prompt_embeds": torch.zeros(1, 8, 32), "negative_pooled_prompt_embeds": torch.zeros(1, 16)}
ADAPTERS = {"ip_adapter_embeds": [IP_EMBEDS] * 2, "negative_ip_adapter_embeds": [IP_EMBEDS] * 2}

MISTAKES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "plain": [
        ({"strength": 0.5}, "strength is given without image or image_latents"),
        ({"image": "star.png"}, "image is of type str"),
        ({"image": []}, "image is an empty list"),
        ({"image": [PICTURE] * 3}, "image has 3 entries for 1 prompts and 1 images; pass 1"),
        ({"image": LATENTS}, "image is of shape (1, 4, 16, 16); it must be (3, height, width)"),
        ({**IMAGE, "image_latents": LATENTS}, "image and image_latents are both given"),
        ({"image_latents": LATENTS[0]}, "image_latents has shape (4, 16, 16)"),
        ({**IMAGE, "noising": "line"}, "noising='line' must be one of"),
        ({"output_type": "jpg"}, "output_type='jpg' must be one of"),
        ({"mask_image": MASK}, "mask_image is given without image"),
        ({"soft_mask": True}, "soft_mask is given without mask_image"),
        ({**IMAGE, "mask_image": tiny_mask((32, 24))}, "mask_image is 32x24, image 32x32; resize the mask"),
        ({"image_latents": LATENTS, "mask": HOLE[..., :8]}, "mask is 8x16, image_latents 16x16"),
        ({"image_latents": LATENTS, "mask": LATENTS}, "mask has shape (1, 4, 16, 16); it must be (n, 1,"),
        ({"image_latents": LATENTS, "mask": 2 * HOLE}, "mask holds values from 2 to 2, not in [0, 1]"),
        ({"denoising_start": 0.5}, "denoising_start is given without image or image_latents"),
        ({**INPAINT, "denoising_start": 0.5}, "denoising_start and mask_image are both given"),
        ({**CROP, "output_type": "np"}, "padding_mask_crop needs single PIL images as image and mask_image, and"),
        ({**CROP, "mask_image": np.asarray(MASK) / 255.0}, "padding_mask_crop needs single PIL images"),
        ({"generator": [generator()] * 3}, "generator holds 3 generators for 1 images"),
        ({"latents": LATENTS.expand(2, -1, -1, -1)}, "latents has shape (2, 4, 16, 16); it must be (1, 4,"),
        ({"height": 33}, "height=33 must be a multiple of the VAE's factor 2; pass 32"),
        ({"negative_target_size": (32, 32)}, "negative_target_size is given without negative_original_size"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer of at least 1"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5 must be"),
        ({"height": "32"}, "height='32' must be"),
        ({"clip_skip": True}, "clip_skip=True must be an integer of at least 0"),
        ({"prompt": None}, "prompt is missing; pass a text"),
        ({"prompt": []}, "prompt is missing; pass a text"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt holds 2 texts, but there are 1 prompts"),
        ({"prompt": ["a", "b"], "prompt_2": "a"}, "prompt_2 holds 1 texts, but there are 2 prompts"),
        ({"negative_prompt_2": "a"}, "negative_prompt_2 is given without negative_prompt"),
        ({"prompt_embeds": LATENTS}, "prompt and prompt_embeds are both given"),
        ({**EMBEDS, "prompt_embeds": [LATENTS]}, "prompt_embeds is of type list; it must be a tensor"),
        ({**EMBEDS, "pooled_prompt_embeds": None}, "prompt_embeds is given without pooled_prompt_embeds"),
        ({**EMBEDS, "negative_prompt": "a"}, "negative_prompt and prompt_embeds are both given"),
        ({**EMBEDS, "prompt_embeds": torch.zeros(16, 32)}, "prompt_embeds has shape (16, 32)"),
        ({**EMBEDS, "prompt_embeds": torch.zeros(1, 16, 24)}, "it must be (prompts, tokens, 32)"),
        ({**EMBEDS, "pooled_prompt_embeds": torch.zeros(1, 1, 16)}, "pooled_prompt_embeds has shape (1, 1, 16)"),
        ({**EMBEDS, "pooled_prompt_embeds": torch.zeros(2, 32)}, "shape (2, 32); it must be (1, 16)"),
        ({**EMBEDS, **NEGATIVES}, "negative_prompt_embeds has shape (1, 8, 32); it must be (1, 16, 32)"),
        (CONTROL, "controlnet not loaded"),
        ({"control_mode": 1}, "control_mode is given without control_image"),
        ({"ip_adapter_image": PICTURE}, "image_encoder not loaded"),
        ({"ip_adapter_embeds": [LATENTS]}, "ip_adapter_embeds is given, but no IP-Adapter is loaded"),
    ],
    "controlnet": [
        (TWO_CONTROLS, "control_image has 2 entries"),
        ({**CONTROL, "control_mode": 1}, "control_mode is given for a ControlNetModel"),
        ({**CONTROL, "control_guidance_start": 0.8, "control_guidance_end": 0.5}, "start=0.8 must be below"),
    ],
    "several": [
        (CONTROL, "control_image holds 1 images for 2 ControlNets; pass 2"),
        ({"control_image": [PICTURE, [PICTURE] * 3]}, "control_image has 3 entries"),
        ({**TWO_CONTROLS, "controlnet_conditioning_scale": [1.0]}, "scale holds 1 values, and must hold 2, one for"),
        ({**TWO_CONTROLS, "control_guidance_end": [1.0, 0.0]}, "control_guidance_end=0.0, in [0, 1]"),
    ],
    "union": [(CONTROL, "control_mode is missing for a ControlNet-Union; pass 0 to")],
    "ip_adapter": [
        ({}, "ip_adapter_image is missing for 2 loaded IP-Adapters"),
        ({"ip_adapter_image": [PICTURE] * 3}, "ip_adapter_image holds 3 entries for 2 IP-Adapters"),
        ({**ADAPTERS, "negative_ip_adapter_embeds": [IP_EMBEDS]}, "negative_ip_adapter_embeds holds 1 entries"),
        ({"ip_adapter_image": [PICTURE] * 2, **ADAPTERS}, "ip_adapter_image and ip_adapter_embeds are both given"),
    ],
}


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {kind: pipeline(kind) for kind in MISTAKES}


@pytest.mark.parametrize(
    ("kind", "inputs", "text"),
    [(kind, *mistake) for kind, mistakes in MISTAKES.items() for mistake in mistakes],
    ids=[f"{kind}-{text}" for kind, mistakes in MISTAKES.items() for _, text in mistakes],
)
def test_an_error_names_the_argument_and_its_value_before_a_model_runs(
    pipelines: dict[str, Any], kind: str, inputs: dict[str, Any], text: str
) -> None:
    assert text in refusal(pipelines[kind], **inputs)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        *[({**IMAGE, "strength": value}, f"strength={value!r} must") for value in (0, 1.5, math.nan, "0.5")],
        ({"denoising_end": 1.2}, "denoising_end=1.2 must"),
        ({"image_latents": LATENTS, "denoising_start": 1.0}, "denoising_start=1.0 must"),
        (
            {"image_latents": LATENTS, "denoising_start": 0.5, "denoising_end": 0.4},
            "must be above denoising_start=0.5",
        ),
    ],
)
def test_where_a_run_starts_and_ends_is_checked_with_the_windows(
    pipelines: dict[str, Any], inputs: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError) as caught:
        run(pipelines["plain"], **inputs)
    assert text in str(caught.value)


def test_guidance_needs_negative_embeddings_for_ip_adapters(pipelines: dict[str, Any]) -> None:
    """Whether there is guidance is known after a delta was merged, which may recommend none."""
    embeds = {"ip_adapter_embeds": [IP_EMBEDS] * 2}
    with pytest.raises(ValueError, match="negative_ip_adapter_embeds"):
        run(pipelines["ip_adapter"], num_inference_steps=1, **embeds)
    run(pipelines["ip_adapter"], num_inference_steps=1, guidance_scale=1.0, **embeds)


def test_a_refiner_is_told_a_score_in_place_of_a_size() -> None:
    pipe = make_pipeline()
    width = pipe.unet.config.addition_time_embed_dim
    pipe.update_components(requires_aesthetics_score=True)
    with pytest.raises(ValueError, match=rf"pooled_prompt_embeds has shape \(1, 16\).*\(1, {16 + width}\)"):
        pipe(**EMBEDS, image=PICTURE)


@pytest.mark.parametrize("inputs", [{}, IMAGE, {**INPAINT, "padding_mask_crop": 4}])
def test_a_float32_vae_works_beside_a_bfloat16_unet(inputs: dict[str, Any]) -> None:
    pipe = make_pipeline()
    inputs = {"prompt": "a star", **inputs, "num_inference_steps": 4}
    expected = pipe(**inputs, generator=generator(), output="images")
    pipe.to(torch.bfloat16)
    pipe.vae.to(torch.float32)
    for _ in range(2):  # the second call finds what the first may have changed
        images = pipe(**inputs, generator=generator(), output="images")
        assert pipe.vae.dtype == torch.float32
        assert np.abs(np.asarray(images[0], float) - np.asarray(expected[0], float)).mean() < 3.0  # of 255


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


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (("unet", "vae"), "unet and vae not loaded"),
        (("text_encoder_2",), "text_encoder_2 not loaded"),
        (("text_encoder", "tokenizer"), "text_encoder and tokenizer not loaded"),  # which is no refiner
    ],
)
def test_components_that_are_not_loaded_are_named(missing: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_pipeline(**dict.fromkeys(missing))(prompt="a star")


@pytest.mark.parametrize(
    ("workflow", "missing"),
    [("controlnet_text2image", "control_image"), ("image2image", "image"), ("ip_adapter_text2image", "ip_adapter_i")],
)
def test_a_workflow_that_was_taken_out_names_what_it_lacks(workflow: str, missing: str) -> None:
    pipe = make_pipeline(PeRFlowSDXLAutoBlocks().get_workflow(workflow))
    with pytest.raises(ValueError, match=f"Required input '{missing}.*' is missing"):
        pipe(prompt="a star")


def test_a_blank_image_is_no_mistake() -> None:
    run(make_pipeline(), prompt="", image=Image.new("RGB", (32, 32)), num_inference_steps=1)
