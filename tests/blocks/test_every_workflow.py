"""All workflows of the stock SDXL blocks, in four steps on tiny components: order of blocks, effect of each input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks
from PIL import Image

from perflow_blocks.blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.testing.tiny import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_feature_extractor,
    tiny_image_encoder,
    tiny_mask,
    tiny_picture,
)
from tests.conftest import count_unet_calls, make_pipeline, run

pytestmark = pytest.mark.behaviour

WORKFLOWS = StableDiffusionXLAutoBlocks._workflow_map
INPUTS: dict[str, tuple[Any, Any]] = {
    "prompt": ("a red star", "a blue ring, large"),
    "image": (tiny_picture(1), tiny_picture(2)),
    "mask_image": (tiny_mask(), tiny_mask().transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "control_image": (tiny_picture(3), tiny_picture(4)),
    "control_mode": (0, 2),
    "ip_adapter_image": (tiny_picture(5), tiny_picture(6)),
}
"""For each input that chooses a workflow two values, of which each must give its own result."""


def workflow_pipeline(name: str, blocks: Any = None) -> Any:
    components: dict[str, Any] = {}
    if "controlnet" in name:
        components["controlnet"] = tiny_controlnet_union() if "union" in name else tiny_controlnet()
    if "ip_adapter" in name:
        components["image_encoder"] = tiny_image_encoder()
    pipe = make_pipeline(blocks, **components)
    if "ip_adapter" in name:
        pipe.feature_extractor = tiny_feature_extractor()  # `update_components` takes no transformers processor
        load_tiny_ip_adapter(pipe)
    return pipe


def workflow_inputs(name: str) -> dict[str, Any]:
    inputs = {key: INPUTS[key][0] for key in WORKFLOWS[name]}
    if "image" in inputs and "mask_image" not in inputs:
        inputs["strength"] = 0.8  # four steps, the first inside a window
    return {**inputs, "num_inference_steps": 4}


def expected_blocks(name: str) -> list[str]:
    inpaint, picture, control = "inpaint" in name, "image2image" in name or "inpaint" in name, "controlnet" in name
    loop = "denoise.denoise"
    return [
        "check_inputs",
        "apply_attention",
        "merge_delta",
        "text_encoder",
        *(["ip_adapter"] if "ip_adapter" in name else []),
        *(["vae_encoder"] if picture else []),
        "denoise.input",
        "denoise.before_denoise.set_timesteps",
        "denoise.before_denoise.prepare_latents",
        "denoise.before_denoise.prepare_add_cond",
        *(["denoise.controlnet_input"] if control else []),
        loop,
        *(["decode.decode", "decode.keep_known_pixels"] if inpaint else ["decode"]),
    ]


def test_the_workflows_are_the_stock_ones() -> None:
    assert PeRFlowSDXLAutoBlocks().available_workflows == list(WORKFLOWS)
    assert len(WORKFLOWS) == 18


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow(name: str) -> None:
    blocks = PeRFlowSDXLAutoBlocks().get_workflow(name)
    assert list(blocks.sub_blocks) == expected_blocks(name)
    loop = blocks.sub_blocks["denoise.denoise"]
    assert ("ControlNet" in type(loop).__name__) == ("controlnet" in name)
    assert ("keep_known" in loop.sub_blocks) == ("inpaint" in name)

    pipe, inputs = workflow_pipeline(name), workflow_inputs(name)
    calls = count_unet_calls(pipe)
    first = run(pipe, **inputs)
    assert calls == [2] * 4
    assert first.shape == (1, 4, 16, 16)
    assert torch.isfinite(first).all()
    for key in WORKFLOWS[name]:
        other = run(pipe, **{**inputs, key: INPUTS[key][1]})
        assert (other - first).abs().max() > 1e-3, key

    pruned = workflow_pipeline(name, blocks)
    assert torch.equal(first, run(pruned, **inputs))


def test_an_ip_adapter_without_guidance() -> None:
    pipe = workflow_pipeline("ip_adapter_text2image")
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    prompts = {"prompt": ["a star", "a ring"], "num_images_per_prompt": 2, "num_inference_steps": 4}
    calls = count_unet_calls(pipe)
    first, second = (run(pipe, ip_adapter_image=tiny_picture(seed), **prompts) for seed in (5, 6))
    assert calls == [4] * 8
    assert (first - second).abs().max() > 1e-3
