"""Every block of the project keeps its contract, alone and in its branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, MultiControlNetModel
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from perflow_blocks import blocks
from perflow_blocks.testing import (
    check_block,
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_inpainting_unet,
    tiny_inputs,
)
from tests.conftest import make_pipeline

OWN_BLOCKS = [
    kind
    for kind in (getattr(blocks, name) for name in blocks.__all__)
    if isinstance(kind, type) and issubclass(kind, ModularPipelineBlocks) and kind is not blocks.LoopBlock
]


@pytest.mark.parametrize("kind", OWN_BLOCKS, ids=lambda kind: kind.__name__)
def test_every_block_keeps_its_contract(kind: type[ModularPipelineBlocks]) -> None:
    components = {}
    if kind is blocks.PeRFlowIPAdapterStep:
        pipe = make_pipeline()
        load_tiny_ip_adapter(pipe)
        components["unet"] = pipe.unet
    assert kind().model_name == "stable-diffusion-xl"
    check_block(kind(), components=components)


def pick(*names: str) -> dict[str, Any]:
    return {name: tiny_inputs()[name] for name in names}


TWO_CONTROLS = {
    "controlnet_cond": [torch.zeros(1, 3, 32, 32)] * 2,
    "conditioning_scale": [0.5] * 2,
    "controlnet_keep": [[1.0] * 2] * 4,
}
NINE_CHANNELS = {"unet": tiny_inpainting_unet()}
OTHER_BRANCHES: dict[str, tuple[type[ModularPipelineBlocks], dict[str, Any], dict[str, Any]]] = {
    "two ControlNets": (
        blocks.PeRFlowControlNetLoopDenoiser,
        {"controlnet": MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)])},
        TWO_CONTROLS,
    ),
    "guess mode": (blocks.PeRFlowControlNetLoopDenoiser, {}, {"guess_mode": True}),
    "nine channels": (blocks.PeRFlowLoopDenoiser, NINE_CHANNELS, pick("inpaint_conditioning")),
    "nine prepared": (blocks.PeRFlowInpaintPrepareLatentsStep, NINE_CHANNELS, pick("masked_image_latents")),
    "known part of nine": (blocks.PeRFlowLoopKeepKnownStep, {}, pick("inpaint_conditioning")),
    "latents given": (blocks.PeRFlowImg2ImgPrepareLatentsStep, {}, pick("latents")),
    "refiner's latents": (blocks.PeRFlowImg2ImgPrepareLatentsStep, {}, {"denoising_start": 0.5}),
    "base": (blocks.PeRFlowSetTimestepsStep, {}, {"denoising_end": 0.5}),
    "refiner": (blocks.PeRFlowImg2ImgSetTimestepsStep, {}, {"denoising_start": 0.5}),
    "IP-Adapters": (blocks.PeRFlowInputStep, {}, pick("ip_adapter_embeds", "negative_ip_adapter_embeds")),
    "generators": (blocks.PeRFlowVaeEncoderStep, {}, {"generator": [torch.Generator(), torch.Generator()]}),
    "latents out": (blocks.PeRFlowKeepKnownPixelsStep, {}, {"output_type": "latent"}),
    "no guidance": (blocks.PeRFlowLoopDenoiser, {"guider": ClassifierFreeGuidance(guidance_scale=1.0)}, {}),
}


@pytest.mark.parametrize(("kind", "components", "inputs"), OTHER_BRANCHES.values(), ids=OTHER_BRANCHES)
@pytest.mark.parametrize("i", [0, 3])
def test_blocks_keep_their_contract_in_other_branches(kind: Any, components: Any, inputs: Any, i: int) -> None:
    check_block(kind(), components=components, inputs=inputs, i=i)
