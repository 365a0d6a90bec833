"""The preset as a whole: its documentation, its inputs and outputs, and the mistakes it catches first."""

from __future__ import annotations

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks

from perflow_blocks.blocks import PeRFlowSDXLAutoBlocks
from tests.conftest import count_unet_calls, generator, make_pipeline, run

pytestmark = pytest.mark.behaviour


def test_the_preset_reads_like_documentation() -> None:
    doc = PeRFlowSDXLAutoBlocks().doc
    assert "TODO" not in doc
    assert "(`None`" not in doc
    assert "`text2image`: requires `prompt`" in doc
    inputs = PeRFlowSDXLAutoBlocks().inputs
    assert all(param.description and param.type_hint is not None for param in inputs)
    assert len({param.name for param in inputs}) == len(inputs)


def test_stock_names_and_defaults() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    stock = list(StableDiffusionXLAutoBlocks().sub_blocks)
    assert list(blocks.sub_blocks) == ["check_inputs", "apply_attention", "merge_delta", *stock]
    pipe = blocks.init_pipeline()
    assert type(pipe.guider) is ClassifierFreeGuidance
    assert pipe.guider.guidance_scale == 2.0
    assert type(pipe).__name__ == "PeRFlowModularPipeline"
    assert {param.name: param.default for param in blocks.inputs}["num_inference_steps"] is None


def test_reading_the_specs_changes_nothing_shared() -> None:
    first, second = PeRFlowSDXLAutoBlocks(), PeRFlowSDXLAutoBlocks()
    first.init_pipeline().guider.guidance_scale = 9.0
    first.inputs[0].description = "changed"
    assert second.init_pipeline().guider.guidance_scale == 2.0
    assert second.inputs[0].description != "changed"


def test_without_the_text_encoder_block_embeddings_are_taken() -> None:
    pipe = make_pipeline()
    expected = pipe(prompt="a star", negative_prompt="a ring", generator=generator(), output_type="latent")
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    given = {name: expected.values[name] for name in names}
    images = make_pipeline(blocks)(**given, generator=generator(), output_type="latent", output="images")
    assert torch.equal(images, expected.images)


def test_the_preset_guards_its_decoder() -> None:
    pipe = make_pipeline()
    decoded: list[int] = []
    pipe.vae.post_quant_conv.register_forward_pre_hook(lambda *_: decoded.append(1))
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        pipe(prompt="a star")
    assert decoded == []


def test_default_call_takes_six_guided_steps() -> None:
    pipe = make_pipeline()
    batches = count_unet_calls(pipe)
    run(pipe)
    assert batches == [2] * 6
