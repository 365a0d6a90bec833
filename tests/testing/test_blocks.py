"""Every block of the project keeps its contract, alone, in its branches and in every workflow of the preset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, MultiControlNetModel, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from PIL import Image

import perflow_blocks.blocks as blocks_module
from perflow_blocks.blocks import (
    PeRFlowControlNetLoopDenoiser,
    PeRFlowImg2ImgPrepareLatentsStep,
    PeRFlowImg2ImgSetTimestepsStep,
    PeRFlowInpaintPrepareLatentsStep,
    PeRFlowInputStep,
    PeRFlowIPAdapterStep,
    PeRFlowKeepKnownPixelsStep,
    PeRFlowLoopDenoiser,
    PeRFlowLoopKeepKnownStep,
    PeRFlowSDXLAutoBlocks,
    PeRFlowSetTimestepsStep,
    PeRFlowVaeEncoderStep,
)
from perflow_blocks.blocks.loop_block import LoopBlock
from perflow_blocks.testing import (
    check_block,
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_inpainting_unet,
    tiny_inputs,
    tiny_sdxl_unet,
)
from perflow_blocks.testing.declarations import LISTS, own_declarations

WORKFLOWS = StableDiffusionXLAutoBlocks._workflow_map
OWN_BLOCKS = [
    kind
    for kind in (getattr(blocks_module, name) for name in blocks_module.__all__)
    if isinstance(kind, type) and issubclass(kind, ModularPipelineBlocks) and kind is not LoopBlock
]


def pick(*names: str) -> dict[str, Any]:
    return {name: tiny_inputs()[name] for name in names}


@pytest.fixture(scope="module")
def adapted_unet() -> Any:
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(unet=tiny_sdxl_unet())
    load_tiny_ip_adapter(pipe)
    return pipe.unet


@pytest.mark.parametrize("kind", OWN_BLOCKS, ids=lambda kind: kind.__name__)
def test_every_block_keeps_its_contract(kind: type[ModularPipelineBlocks], adapted_unet: Any) -> None:
    block = kind()
    assert block.model_name == "stable-diffusion-xl"
    for attribute in LISTS:
        for entry in own_declarations(block, attribute):
            assert entry.description.endswith("."), f"{attribute}: {entry.name}"
    check_block(block, components={"unet": adapted_unet} if kind is PeRFlowIPAdapterStep else {})


OTHER_BRANCHES: dict[str, tuple[ModularPipelineBlocks, dict[str, Any], dict[str, Any], int]] = {
    "one more ControlNet": (
        PeRFlowControlNetLoopDenoiser(),
        {"controlnet": MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)])},
        {
            "controlnet_cond": [torch.zeros(1, 3, 32, 32)] * 2,
            "conditioning_scale": [0.5] * 2,
            "controlnet_keep": [[1.0] * 2] * 4,
        },
        1,
    ),
    "ControlNet in guess mode": (PeRFlowControlNetLoopDenoiser(), {}, {"guess_mode": True}, 0),
    "nine channels": (PeRFlowLoopDenoiser(), {"unet": tiny_inpainting_unet()}, pick("inpaint_conditioning"), 0),
    "nine channels, prepared": (
        PeRFlowInpaintPrepareLatentsStep(),
        {"unet": tiny_inpainting_unet()},
        pick("masked_image_latents"),
        0,
    ),
    "known part left to nine channels": (PeRFlowLoopKeepKnownStep(), {}, pick("inpaint_conditioning"), 0),
    "known part at the end": (PeRFlowLoopKeepKnownStep(), {}, pick("inpaint_conditioning"), 3),
    "latents given": (PeRFlowImg2ImgPrepareLatentsStep(), {}, pick("latents"), 0),
    "picture from an earlier run": (PeRFlowImg2ImgPrepareLatentsStep(), {}, {"denoising_start": 0.5}, 0),
    "base": (PeRFlowSetTimestepsStep(), {}, {"denoising_end": 0.5}, 0),
    "refiner": (PeRFlowImg2ImgSetTimestepsStep(), {}, {"denoising_start": 0.5}, 0),
    "IP-Adapters": (PeRFlowInputStep(), {}, pick("ip_adapter_embeds", "negative_ip_adapter_embeds"), 0),
    "generators": (PeRFlowVaeEncoderStep(), {}, {"generator": [torch.Generator(), torch.Generator()]}, 0),
    "latents out": (PeRFlowKeepKnownPixelsStep(), {}, {"output_type": "latent"}, 0),
    "no guidance": (PeRFlowLoopDenoiser(), {"guider": ClassifierFreeGuidance(guidance_scale=1.0)}, {}, 0),
}


@pytest.mark.parametrize(("block", "components", "inputs", "i"), OTHER_BRANCHES.values(), ids=OTHER_BRANCHES)
def test_blocks_keep_their_contract_in_other_branches(
    block: ModularPipelineBlocks, components: dict[str, Any], inputs: dict[str, Any], i: int
) -> None:
    check_block(block, components=components, inputs=inputs, i=i)


@pytest.mark.parametrize(("name", "triggers"), WORKFLOWS.items(), ids=WORKFLOWS)
def test_the_preset_keeps_its_contract_in_every_workflow(
    name: str, triggers: dict[str, bool], adapted_unet: Any
) -> None:
    components: dict[str, Any] = {"controlnet": (tiny_controlnet_union if "union" in name else tiny_controlnet)()}
    if "ip_adapter" in name:
        components["unet"] = adapted_unet
    state = check_block(PeRFlowSDXLAutoBlocks(), components=components, inputs=pick(*triggers))
    assert [type(image) for image in state.get("images")] == [Image.Image]
