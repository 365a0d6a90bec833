"""The presets for one task each give what the preset for all gives when it is asked for the task."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perflow_blocks.blocks import PeRFlowSDXLAutoBlocks, PeRFlowTiledControlNetLoopDenoiser
from perflow_blocks.blocks.workflows import (
    PeRFlowSDXLControlNetBlocks,
    PeRFlowSDXLImage2ImageBlocks,
    PeRFlowSDXLInpaintBlocks,
    PeRFlowSDXLIPAdapterBlocks,
    PeRFlowSDXLText2ImageBlocks,
    PeRFlowSDXLTileUpscalerBlocks,
)
from tests.blocks.test_every_workflow import workflow_inputs, workflow_pipeline
from tests.conftest import run

pytestmark = pytest.mark.behaviour

TASKS: dict[str, type[Any]] = {
    "text2image": PeRFlowSDXLText2ImageBlocks,
    "image2image": PeRFlowSDXLImage2ImageBlocks,
    "inpainting": PeRFlowSDXLInpaintBlocks,
    "controlnet_text2image": PeRFlowSDXLControlNetBlocks,
    "ip_adapter_text2image": PeRFlowSDXLIPAdapterBlocks,
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_the_auto_blocks_do_for_its_inputs(name: str) -> None:
    inputs = workflow_inputs(name)
    given = run(workflow_pipeline(name, TASKS[name]()), **inputs)
    assert torch.equal(given, run(workflow_pipeline(name), **inputs))


def test_the_upscaler_is_image_to_image_with_the_tiled_denoiser() -> None:
    name = "controlnet_image2image"
    inputs = {**workflow_inputs(name), "tile_size": 16, "tile_overlap": 8}
    assembled = PeRFlowSDXLAutoBlocks().get_workflow(name)
    assembled.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = PeRFlowTiledControlNetLoopDenoiser()
    tiled = run(workflow_pipeline(name, assembled), **inputs)
    assert torch.equal(run(workflow_pipeline(name, PeRFlowSDXLTileUpscalerBlocks()), **inputs), tiled)
    assert not torch.equal(tiled, run(workflow_pipeline(name), **workflow_inputs(name)))


@pytest.mark.parametrize("kind", [*TASKS.values(), PeRFlowSDXLTileUpscalerBlocks])
def test_a_task_says_what_it_does_takes_and_gives(kind: type[Any]) -> None:
    blocks = kind()
    assert blocks.description and [param.name for param in blocks.outputs] == ["images"]
    assert all(param.description for param in [*blocks.inputs, *blocks.outputs])
    assert {"text_encoder", "denoise", "decode"} <= set(blocks.sub_blocks)
