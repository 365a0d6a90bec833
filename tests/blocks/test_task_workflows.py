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


def test_a_task_says_what_it_does_takes_and_gives() -> None:
    for kind in (*TASKS.values(), PeRFlowSDXLTileUpscalerBlocks):
        blocks = kind()
        assert blocks.description and blocks.output_names == ["images"]
        assert all(param.description for param in [*blocks.inputs, *blocks.outputs])


def test_a_task_needs_the_components_and_takes_the_inputs_of_its_own_alone() -> None:
    blocks = PeRFlowSDXLText2ImageBlocks()
    assert not {"controlnet", "image_encoder"} & set(blocks.component_names)
    assert not {"image", "mask_image", "control_image", "strength"} & set(blocks.input_names)


def test_the_progress_bar_is_reached() -> None:
    pipe = workflow_pipeline("text2image", PeRFlowSDXLText2ImageBlocks())
    pipe.set_progress_bar_config(disable=True)
    assert pipe._blocks.sub_blocks["denoise"].sub_blocks["denoise"]._progress_bar_config == {"disable": True}
