"""Assembled blocks know their inputs as diffusers does, and ask their parts for them once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

from perflow_blocks.blocks import PeRFlowDenoiseStep, PeRFlowSDXLAutoBlocks
from perflow_blocks.blocks.assembly import AskedOnce


def assembled(blocks: Any) -> Iterator[tuple[str, AskedOnce]]:
    for name, block in blocks.sub_blocks.items():
        if isinstance(block, AskedOnce):
            yield name, block
        yield from assembled(block)


ASSEMBLED = dict(assembled(PeRFlowSDXLAutoBlocks()))


@pytest.mark.parametrize("name", ASSEMBLED)
def test_inputs_are_those_that_diffusers_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ASSEMBLED[name].inputs
    monkeypatch.delattr(AskedOnce, "inputs")
    monkeypatch.delattr(AskedOnce, "required_inputs")
    theirs = ASSEMBLED[name].inputs
    assert own == theirs
    assert [param.required for param in own] == [param.required for param in theirs]


def test_some_inputs_are_required_and_some_are_not() -> None:
    found = {param.required for block in ASSEMBLED.values() for param in block.inputs}
    assert found == {True, False}


class Asked(ModularPipelineBlocks):
    """Counts how often it is asked."""

    model_name = "stable-diffusion-xl"
    times = 0

    @property
    def description(self) -> str:
        return "Loop step that counts how often it is asked for its inputs."

    @property
    def inputs(self) -> list[InputParam]:
        Asked.times += 1
        return [InputParam("noise_pred", required=True), InputParam("damping", default=1.0)]


def test_the_number_of_inputs_does_not_multiply_the_work() -> None:
    blocks, asked = PeRFlowSDXLAutoBlocks(), Asked()
    blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks["asked"] = asked
    Asked.times = 0
    names = {param.name: param.required for param in blocks.inputs}
    assert "damping" in names and len(names) > 40
    assert 2 <= Asked.times <= 20  # for its inputs and for the required ones, at each of the levels around it


def test_what_is_required_follows_the_parts() -> None:
    loop = PeRFlowDenoiseStep()
    assert "damping" not in loop.required_inputs
    before = {param.name for param in loop.inputs}
    loop.sub_blocks["asked"] = Asked()
    assert {param.name for param in loop.inputs} - before == {"damping"}
