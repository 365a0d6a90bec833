"""The preset as a whole: its documentation, its inputs and outputs, and the mistakes it catches first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks
from PIL import Image

from perflow_blocks.blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.testing.tiny import tiny_picture
from tests.conftest import count_unet_calls, generator, make_pipeline, run, watch_models

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


def test_pictures_for_a_list_of_prompts() -> None:
    images = make_pipeline()(prompt=["a star", "a ring"], num_images_per_prompt=2, output="images")
    assert [type(image) for image in images] == [Image.Image] * 4
    assert images[0].size == (32, 32)


def test_size_and_array_output() -> None:
    images = make_pipeline()(prompt="a star", height=24, width=40, output_type="np", output="images")
    assert images.shape == (1, 24, 40, 3)


def test_prompts_in_a_batch_are_drawn_as_they_would_be_alone() -> None:
    pipe = make_pipeline()
    together = run(pipe, prompt=["a star", "a ring"], generator=[generator(1), generator(2)])
    alone = [run(pipe, prompt=p, generator=generator(s)) for p, s in (("a star", 1), ("a ring", 2))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=0.1)


def test_a_negative_prompt_has_an_effect_under_guidance() -> None:
    pipe = make_pipeline()
    assert not torch.allclose(run(pipe), run(pipe, negative_prompt="a square"), atol=1e-4)


def test_the_workflow_can_be_taken_out() -> None:
    pipe, pruned = make_pipeline(), make_pipeline(PeRFlowSDXLAutoBlocks().get_workflow("text2image"))
    assert torch.equal(run(pipe), run(pruned))


def test_without_the_text_encoder_block_embeddings_are_taken() -> None:
    pipe = make_pipeline()
    expected = pipe(prompt="a star", negative_prompt="a ring", generator=generator(), output_type="latent")
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    given = {name: expected.values[name] for name in names}
    images = make_pipeline(blocks)(**given, generator=generator(), output_type="latent", output="images")
    assert torch.equal(images, expected.images)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make_pipeline()


def test_a_watch_sees_each_model_until_it_ends(pipeline: Any) -> None:
    ran, stop = watch_models(pipeline)
    pipeline(prompt="a star", image=tiny_picture())
    assert set(ran) == {"text_encoder", "text_encoder_2", "unet", "vae"}
    assert ran[-1] == "vae"  # which decodes
    assert "vae" in ran[: ran.index("unet")]  # and encodes
    stop()
    ran.clear()
    pipeline(prompt="a star")
    assert ran == []


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


def test_a_second_text_encoder_that_failed_to_load_is_named() -> None:
    with pytest.raises(ValueError, match="text_encoder_2 not loaded"):
        run(make_pipeline(text_encoder_2=None))
