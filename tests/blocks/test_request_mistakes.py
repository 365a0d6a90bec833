"""What callers of each workflow get wrong: one clear line, before any model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiControlNetModel

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
from tests.conftest import generator, make_pipeline, watch_models

pytestmark = pytest.mark.behaviour

PICTURE, MASK = tiny_picture(1), tiny_mask()
LATENTS = torch.zeros(1, 4, 16, 16)
HOLE = torch.ones(1, 1, 16, 16)


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
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("plain", {**IMAGE, "strength": 0}, r"strength=0 is outside \(0, 1\]; pass for example 0.5"),
    ("plain", {**IMAGE, "strength": 1.5}, r"strength=1.5 is outside \(0, 1\]"),
    ("plain", {**IMAGE, "strength": -0.1}, r"strength=-0.1 is outside"),
    ("plain", {**IMAGE, "strength": float("nan")}, r"strength=nan is outside"),
    ("plain", {**IMAGE, "strength": "0.5"}, r"strength='0.5' is outside"),
    ("plain", {"image": "star.png"}, "image is of type str; pass a PIL picture"),
    ("plain", {"image": []}, "image is an empty list"),
    ("plain", {"image": [PICTURE] * 3}, "image holds 3 pictures for 1 prompts"),
    ("plain", {"image": LATENTS}, "image has 4 channels, as latents have; pass latents as image_latents"),
    ("plain", {**IMAGE, "image_latents": LATENTS}, "both image and image_latents are given"),
    ("plain", {"image_latents": LATENTS[0]}, r"image_latents is of shape \(4, 16, 16\); pass a tensor \(n, 4"),
    ("plain", {**IMAGE, "noising": "line"}, "noising='line' is unknown; pass one of chord, marginal"),
    ("plain", {"on_nonfinite": "ignore"}, "on_nonfinite='ignore' is unknown; pass one of raise, fallback"),
    ("plain", {"mask_image": MASK}, "a mask is given but no picture; pass image"),
    ("plain", {"image": PICTURE, "mask_image": tiny_mask((32, 24))}, "mask_image is 32x24, image 32x32"),
    ("plain", {"image": PICTURE, "mask_image": np.zeros((16, 32))}, "mask_image is 32x16, image 32x32"),
    ("plain", {"image_latents": LATENTS, "mask": HOLE[..., :8]}, "mask is 8x16, image_latents 16x16"),
    ("plain", {"image_latents": LATENTS, "mask": LATENTS}, r"mask is of shape .* pass a tensor \(n, 1"),
    ("plain", {"image_latents": LATENTS, "mask_image": MASK}, "mask_image goes with image"),
    ("plain", {**IMAGE, "mask": HOLE}, "mask goes with image_latents"),
    ("plain", {"image": PICTURE, "mask_image": [MASK] * 2}, "mask_image holds 2 pictures for 1 prompts"),
    ("plain", {"image": [PICTURE], "mask_image": MASK, "padding_mask_crop": 8}, "padding_mask_crop needs image"),
    ("plain", {"denoising_end": 1.2}, r"denoising_end=1.2 is outside \(0, 1\]"),
    ("plain", {"denoising_end": 0}, r"denoising_end=0 is outside"),
    ("plain", {"image_latents": LATENTS, "denoising_start": 1.0}, r"denoising_start=1.0 is outside \(0, 1\)"),
    (
        "plain",
        {"image_latents": LATENTS, "denoising_start": 0.5, "denoising_end": 0.5},
        "denoising_end=0.5 is not above denoising_start=0.5",
    ),
    ("plain", {"denoising_start": 0.5}, "denoising_start goes on from latents of an earlier run, and none are given"),
    ("plain", {**INPAINT, "denoising_start": 0.5}, "pass them as latents beside image"),
    ("plain", {**IMAGE, "generator": [generator()] * 3}, "3 generators for 1 pictures"),
    ("plain", {**INPAINT, "generator": [generator()] * 2}, "2 generators for 1 pictures"),
    ("plain", {**IMAGE, "latents": LATENTS[:, :3]}, r"latents have shape \(1, 3, 16, 16\)"),
    ("plain", {"generator": (generator(),)}, "generator is of type tuple; pass a torch.Generator, or a list"),
    ("plain", {"generator": [7]}, "generator is of type int"),
    ("plain", {"latents": [LATENTS]}, "latents are of type list; pass a tensor"),
    ("plain", {"latents": LATENTS, "height": 48}, "height=48, but the latents are those of 32 pixels; pass 32"),
    ("plain", {"latents": LATENTS, "width": 16}, "width=16, but the latents are those of 32 pixels"),
    ("plain", {"original_size": [32, 32]}, r"original_size=\[32, 32\] is no pair; pass a tuple"),
    ("plain", {"target_size": 32}, "target_size=32 is no pair"),
    ("plain", {"cross_attention_kwargs": 0.5}, "cross_attention_kwargs is of type float; pass a dictionary"),
    ("plain", {"negative_prompt_2": "a"}, "negative_prompt_2 goes with negative_prompt"),
    ("plain", {"prompt": None, "prompt_embeds": [LATENTS]}, "prompt_embeds is of type list; pass a tensor"),
    ("plain", {**CONTROL}, "controlnet not loaded"),
    ("plain", {"control_mode": 1}, "control_mode is given but control_image is missing"),
    ("plain", {"ip_adapter_image": PICTURE}, "image_encoder not loaded"),
    ("plain", {"ip_adapter_embeds": [LATENTS]}, r"no IP-Adapter is loaded; call pipe.load_ip_adapter"),
    ("plain", {"prompt_embeds": LATENTS}, "both prompt and prompt_embeds are given; pass texts alone"),
    ("plain", {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 32)}, "only one of prompt_embeds and pooled"),
    (
        "plain",
        {
            "prompt": None,
            "prompt_embeds": torch.zeros(1, 16, 32),
            "pooled_prompt_embeds": torch.zeros(1, 16),
            "negative_prompt": "a",
        },
        "negative_prompt is given beside prompt_embeds",
    ),
    ("controlnet", {"controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale is given but control_image"),
    ("controlnet", {"control_image": [PICTURE] * 2}, "control_image holds 2 pictures for 1 prompts"),
    (
        "several",
        {"control_image": [PICTURE, [PICTURE] * 3]},
        "control_image holds 3 pictures for 1 prompts; pass one, or one for each",
    ),
    ("controlnet", {**CONTROL, "control_mode": 1}, "control_mode is given, but the controlnet is a ControlNetModel"),
    ("controlnet", {**CONTROL, "control_guidance_start": 0.8, "control_guidance_end": 0.5}, "are no range in"),
    ("controlnet", {**CONTROL, "control_guidance_start": 0.5, "control_guidance_end": 0.5}, "are no range in"),
    ("controlnet", {**CONTROL, "control_guidance_end": 1.5}, "are no range in"),
    (
        "several",
        {"control_image": [PICTURE] * 2, "control_guidance_start": [0.5, 0.5], "control_guidance_end": [1.0, 0.2]},
        "control_guidance_start=0.5 and control_guidance_end=0.2 are no range",
    ),
    ("several", {**CONTROL}, r"1 control image\(s\) for 2 ControlNets; pass a list with one for each"),
    ("several", {"control_image": [PICTURE] * 3}, r"3 control image\(s\) for 2 ControlNets"),
    (
        "several",
        {"control_image": [PICTURE] * 2, "controlnet_conditioning_scale": [1.0]},
        "controlnet_conditioning_scale holds 1 values for 2 ControlNets",
    ),
    ("union", {**CONTROL}, "control_mode is missing, which a ControlNet-Union needs"),
    ("union", {**CONTROL, "control_mode": [0, 1]}, "1 control images for 2 modes"),
    ("union", {**CONTROL, "control_mode": 99}, "control_mode=99 is no kind of this ControlNet-Union; pass 0 to"),
    ("union", {**CONTROL, "control_mode": 1, "control_guidance_end": [0.5]}, "control_guidance_end is a list"),
    ("controlnet", {**CONTROL, "controlnet_conditioning_scale": [1.0, 0.1]}, "is a list, but a single ControlNet"),
    ("controlnet", {**CONTROL, "control_guidance_start": [0.0, 0.5]}, "control_guidance_start is a list"),
    ("controlnet", {**CONTROL, "control_guidance_start": "0.2"}, "are no range in"),
    ("controlnet", {"control_image": np.zeros((32, 32, 3), np.uint8)}, "control_image holds uint8; pass values in"),
    ("controlnet", {"control_image": "edges.png"}, "control_image is of type str; pass a PIL picture"),
    ("controlnet", {"control_image": []}, "control_image is an empty list"),
    ("union", {"control_image": [np.zeros((32, 32))], "control_mode": [1]}, "control_image"),
    ("controlnet", {"control_image": (PICTURE, PICTURE)}, "control_image is a tuple; pass a list"),
    ("union", {**CONTROL, "control_mode": (1,)}, "control_mode is a tuple"),
    (
        "union",
        {"control_image": [PICTURE] * 2, "control_mode": [0, 1], "controlnet_conditioning_scale": [1.0]},
        "controlnet_conditioning_scale holds 1 values for 2 controls",
    ),
    ("plain", {"image_latents": LATENTS, "height": 64}, "height=64, but the latents are those of 32 pixels"),
    ("plain", {"latents": LATENTS.half()}, r"latents are torch.float16, the UNet torch.float32; pass latents.to"),
    ("nine", {}, "the UNet takes 9 channels and is made for inpainting; pass image and mask_image"),
    ("nine", {**IMAGE}, "the UNet takes 9 channels"),
    ("ip_adapter", {}, r"the UNet has 2 IP-Adapter\(s\) loaded, but ip_adapter_image is missing"),
    ("ip_adapter", {"ip_adapter_image": PICTURE}, "given for 1 IP-Adapters, and 2 are loaded"),
    ("ip_adapter", {"ip_adapter_image": [PICTURE] * 3}, "given for 3 IP-Adapters, and 2 are loaded"),
    ("ip_adapter", {"ip_adapter_embeds": [LATENTS]}, "ip_adapter_embeds is given for 1 IP-Adapters, and 2"),
    ("ip_adapter", {"ip_adapter_embeds": [LATENTS] * 2}, "negative_ip_adapter_embeds are missing under guidance"),
    (
        "ip_adapter",
        {"ip_adapter_embeds": [LATENTS] * 2, "negative_ip_adapter_embeds": [LATENTS]},
        "negative_ip_adapter_embeds holds 1 tensors for 2 IP-Adapters",
    ),
    (
        "ip_adapter",
        {"ip_adapter_embeds": [LATENTS[0, 0]] * 2, "negative_ip_adapter_embeds": [LATENTS] * 2},
        "ip_adapter_embeds is no list of tensors",
    ),
    (
        "ip_adapter",
        {"ip_adapter_image": [PICTURE] * 2, "ip_adapter_embeds": [LATENTS] * 2},
        "both ip_adapter_image and ip_adapter_embeds are given",
    ),
]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {kind: pipeline(kind) for kind in ("plain", "controlnet", "several", "union", "nine", "ip_adapter")}


@pytest.mark.parametrize(("kind", "inputs", "message"), MISTAKES, ids=[f"{k}-{m[:40]}" for k, _, m in MISTAKES])
def test_mistake(pipelines: dict[str, Any], kind: str, inputs: dict[str, Any], message: str) -> None:
    pipe = pipelines[kind]
    ran, stop = watch_models(pipe)
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**{"prompt": "a star", "num_inference_steps": 4, **inputs})
    stop()
    assert ran == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["controlnet", "vae", "text_encoder_2"])
def test_models_of_another_type_are_named(name: str) -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet())
    getattr(pipe, name).to(torch.bfloat16)
    with pytest.raises(ValueError, match=f"the {name} is torch.bfloat16, the UNet torch.float32; load all components"):
        pipe(prompt="a star", control_image=PICTURE)


def test_the_base_model_without_its_first_text_encoder_is_no_refiner() -> None:
    with pytest.raises(ValueError, match="text_encoder and tokenizer not loaded"):
        make_pipeline(text_encoder=None, tokenizer=None)(prompt="a star")


def test_what_a_part_of_the_preset_does_not_take_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    make_pipeline(PeRFlowSDXLAutoBlocks().get_workflow("text2image"))(prompt="a star", image=PICTURE)
    assert "image is given, but no block of this pipeline takes it; it is ignored" in caplog.text
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
    with pytest.raises(ValueError, match=f"{missing} is missing, and this workflow needs it; pass {missing}="):
        pipe(prompt="a star")
