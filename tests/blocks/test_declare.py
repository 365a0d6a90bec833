"""Declarations: those that diffusers finds, worked out once per arrangement of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from perflow_blocks import PeRFlowDenoiseStep, PeRFlowSDXLAutoBlocks
from perflow_blocks.blocks.auto_blocks import Preset
from perflow_blocks.blocks.declare import Assembled, declared


def assembled(blocks: Any) -> Iterator[tuple[str, Assembled]]:
    for name, block in blocks.sub_blocks.items():
        if isinstance(block, Assembled):
            yield name, block
        yield from assembled(block)


ASSEMBLED = dict(assembled(PeRFlowSDXLAutoBlocks()))


@pytest.mark.parametrize("name", ASSEMBLED)
def test_declarations_are_those_that_diffusers_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {kind: getattr(ASSEMBLED[name], kind) for kind in ("inputs", "required_inputs", "intermediate_outputs")}
    for kind in own:
        monkeypatch.delattr(Assembled, kind)
    theirs = {kind: getattr(ASSEMBLED[name], kind) for kind in own}
    assert own["inputs"] == theirs["inputs"]
    assert [entry.required for entry in own["inputs"]] == [entry.required for entry in theirs["inputs"]]
    assert set(own["required_inputs"]) == set(theirs["required_inputs"])
    assert own["intermediate_outputs"] == theirs["intermediate_outputs"]


class Asked(ModularPipelineBlocks):
    """Counts how often it is asked."""

    model_name = "stable-diffusion-xl"
    description = "Loop step that counts how often it is asked for its inputs."
    times = 0

    @property
    def inputs(self) -> list[InputParam]:
        Asked.times += 1
        return [InputParam("noise_pred", required=True), InputParam("damping", default=1.0)]


def test_inputs_are_worked_out_once_and_follow_the_parts() -> None:
    blocks, asked = PeRFlowSDXLAutoBlocks(), Asked()
    loop = blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks["denoise"]
    before = set(blocks.input_names)
    loop.sub_blocks["asked"] = asked
    assert set(blocks.input_names) - before == {"damping"}
    Asked.times = 0
    assert "damping" in blocks.input_names and "damping" not in blocks.required_inputs
    assert Asked.times == 0
    loop.sub_blocks.pop("asked")
    assert set(blocks.input_names) == before


@pytest.mark.behaviour
def test_inputs_of_a_removed_block_go_with_it() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    assert {"ip_adapter_image", "image", "padding_mask_crop"} <= set(blocks.input_names)
    blocks.sub_blocks.pop("ip_adapter")
    assert "ip_adapter_image" not in blocks.input_names
    assert "ip_adapter_embeds" in blocks.input_names
    blocks.sub_blocks.pop("vae_encoder")
    assert "image_latents" in blocks.input_names and isinstance(blocks, Preset)


def test_what_is_read_may_be_written_to() -> None:
    class Step(ModularPipelineBlocks):
        inputs = declared(InputParam("latents", required=True))
        intermediate_outputs = declared(OutputParam("latents"))

    step = Step()
    step.inputs[0].required = False
    step.inputs.clear()
    assert step.inputs[0].required and Step.inputs[0].required
    loop = PeRFlowDenoiseStep()
    loop.inputs.clear()
    assert "latents" in loop.input_names
