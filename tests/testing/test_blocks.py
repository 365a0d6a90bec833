"""Every block of the project keeps its contract, alone and in its branches."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, MultiControlNetModel
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from perflow_blocks import PeRFlowSDAutoBlocks, blocks
from perflow_blocks.testing import (
    check_block,
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_inpainting_unet,
    tiny_inputs,
)
from perflow_blocks.testing.tiny import tiny_sd_unet
from tests.conftest import make_pipeline

NOT_ALONE = {"LoopBlock", "Preset", "SDPreset", "PeRFlowControlNetInputStep", "PeRFlowSDXLAutoDenoiseStep"}
"""Base classes, and blocks that need inputs of one task."""
MODULES = [
    import_module(f"{blocks.__name__}.{module.name}")
    for module in iter_modules(blocks.__path__)
    if module.name not in ("workflows", "unconditional")
]
OWN_BLOCKS: dict[str, Any] = {
    name: kind
    for module in MODULES
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, ModularPipelineBlocks) and kind.__module__ == module.__name__
    if name not in NOT_ALONE
}


@pytest.mark.parametrize("name", OWN_BLOCKS)
def test_every_block_keeps_its_contract(name: str) -> None:
    kind, components = OWN_BLOCKS[name], {}
    if name == "PeRFlowIPAdapterStep":
        pipe = make_pipeline()
        load_tiny_ip_adapter(pipe)
        components["unet"] = pipe.unet
    assert kind().model_name == "stable-diffusion-xl"
    if kind is PeRFlowSDAutoBlocks:
        components["unet"] = tiny_sd_unet()
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
        OWN_BLOCKS["PeRFlowControlNetLoopDenoiser"],
        {"controlnet": MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)])},
        TWO_CONTROLS,
    ),
    "guess mode": (OWN_BLOCKS["PeRFlowControlNetLoopDenoiser"], {}, {"guess_mode": True}),
    "nine channels": (OWN_BLOCKS["PeRFlowLoopDenoiser"], NINE_CHANNELS, pick("inpaint_conditioning")),
    "nine prepared": (OWN_BLOCKS["PeRFlowInpaintPrepareLatentsStep"], NINE_CHANNELS, pick("masked_image_latents")),
    "known part of nine": (OWN_BLOCKS["PeRFlowLoopKeepKnownStep"], {}, pick("inpaint_conditioning")),
    "latents given": (OWN_BLOCKS["PeRFlowImg2ImgPrepareLatentsStep"], {}, pick("latents")),
    "refiner's latents": (OWN_BLOCKS["PeRFlowImg2ImgPrepareLatentsStep"], {}, {"denoising_start": 0.5}),
    "base": (OWN_BLOCKS["PeRFlowSetTimestepsStep"], {}, {"denoising_end": 0.5}),
    "refiner": (OWN_BLOCKS["PeRFlowImg2ImgSetTimestepsStep"], {}, {"denoising_start": 0.5}),
    "IP-Adapters": (OWN_BLOCKS["PeRFlowInputStep"], {}, pick("ip_adapter_embeds", "negative_ip_adapter_embeds")),
    "generators": (OWN_BLOCKS["PeRFlowVaeEncoderStep"], {}, {"generator": [torch.Generator(), torch.Generator()]}),
    "latents out": (OWN_BLOCKS["PeRFlowKeepKnownPixelsStep"], {}, {"output_type": "latent"}),
    "no guidance": (OWN_BLOCKS["PeRFlowLoopDenoiser"], {"guider": ClassifierFreeGuidance(guidance_scale=1.0)}, {}),
}


@pytest.mark.parametrize(("kind", "components", "inputs"), OTHER_BRANCHES.values(), ids=OTHER_BRANCHES)
@pytest.mark.parametrize("i", [0, 3])
def test_blocks_keep_their_contract_in_other_branches(kind: Any, components: Any, inputs: Any, i: int) -> None:
    check_block(kind(), components=components, inputs=inputs, i=i)
