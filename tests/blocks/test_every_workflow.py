"""The presets: all workflows of the stock SDXL blocks, the presets for one task, and pipelines of parts of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks
from PIL import Image

from perflow_blocks import PeRFlowSDXLAutoBlocks, PeRFlowTiledControlNetLoopDenoiser
from perflow_blocks.blocks.workflows import (
    PeRFlowSDXLControlNetBlocks,
    PeRFlowSDXLImage2ImageBlocks,
    PeRFlowSDXLInpaintBlocks,
    PeRFlowSDXLIPAdapterBlocks,
    PeRFlowSDXLText2ImageBlocks,
    PeRFlowSDXLTileUpscalerBlocks,
)
from perflow_blocks.testing.tiny import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_feature_extractor,
    tiny_image,
    tiny_image_encoder,
    tiny_mask,
    tiny_sdxl_components,
)
from tests.conftest import count_unet_calls, generator, make_pipeline, run

pytestmark = pytest.mark.behaviour

WORKFLOWS = StableDiffusionXLAutoBlocks._workflow_map
INPUTS: dict[str, tuple[Any, Any]] = {
    "prompt": ("a red star", "a blue ring, large"),
    "image": (tiny_image(1), tiny_image(2)),
    "mask_image": (tiny_mask(), tiny_mask().transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "control_image": (tiny_image(3), tiny_image(4)),
    "control_mode": (0, 2),
    "ip_adapter_image": (tiny_image(5), tiny_image(6)),
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
    first, second = (run(pipe, ip_adapter_image=tiny_image(seed), **prompts) for seed in (5, 6))
    assert calls == [4] * 8
    assert (first - second).abs().max() > 1e-3


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


TASKS: dict[str, dict[str, Any]] = {
    "text2image": {},
    "image2image": {"image": tiny_image(1), "strength": 0.6},
    "inpainting": {"image": tiny_image(1), "mask_image": tiny_mask()},
}


def stage(block: Any) -> Any:
    """A pipeline of one block, with those of the tiny components that it declares."""
    pipe = block.init_pipeline()
    pipe.update_components(**{n: c for n, c in tiny_sdxl_components().items() if n in block.component_names})
    return pipe


@pytest.mark.parametrize("task", TASKS)
def test_a_state_is_handed_from_pipeline_to_pipeline(task: str) -> None:
    inputs = {"prompt": "a star", "negative_prompt": "a ring", "num_inference_steps": 4, **TASKS[task]}
    whole = make_pipeline()(**inputs, generator=generator(), output_type="pt")
    blocks = PeRFlowSDXLAutoBlocks()
    text, encode, decode = (stage(blocks.sub_blocks.pop(name)) for name in ("text_encoder", "vae_encoder", "decode"))
    denoise = make_pipeline(blocks, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    state = text(**{name: inputs[name] for name in ("prompt", "negative_prompt")})
    if "image" in inputs:
        pictures = {name: inputs[name] for name in ("image", "mask_image") if name in inputs}
        state = encode(state=state, **pictures, generator=(noise := generator()))
    else:
        noise = generator()
    settings = {name: inputs[name] for name in ("num_inference_steps", "strength") if name in inputs}
    state = denoise(state=state, **settings, generator=noise)
    assert torch.equal(state.get("latents"), whole.get("latents"))
    state = decode(state=state, output_type="pt")
    torch.testing.assert_close(state.get("images"), whole.get("images"))


def test_a_pipeline_that_only_denoises_needs_no_vae() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    for name in ("text_encoder", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    given = make_pipeline()(prompt="a star", output_type="latent").get_by_kwargs("denoiser_input_fields")
    embeddings = {name: value for name, value in given.items() if "prompt_embeds" in name}
    pipe = make_pipeline(blocks, vae=None)
    start = torch.randn(1, 4, 16, 16, generator=generator())
    latents = pipe(**embeddings, latents=start, output="latents")
    assert latents.shape == (1, 4, 16, 16)


PRESETS: dict[str, type[Any]] = {
    "text2image": PeRFlowSDXLText2ImageBlocks,
    "image2image": PeRFlowSDXLImage2ImageBlocks,
    "inpainting": PeRFlowSDXLInpaintBlocks,
    "controlnet_text2image": PeRFlowSDXLControlNetBlocks,
    "ip_adapter_text2image": PeRFlowSDXLIPAdapterBlocks,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_task_is_what_the_auto_blocks_do_for_its_inputs(name: str) -> None:
    inputs = workflow_inputs(name)
    given = run(workflow_pipeline(name, PRESETS[name]()), **inputs)
    assert torch.equal(given, run(workflow_pipeline(name), **inputs))


def test_the_upscaler_is_image_to_image_with_the_tiled_denoiser() -> None:
    name = "controlnet_image2image"
    inputs = {**workflow_inputs(name), "tile_size": 16, "tile_overlap": 8}
    assembled = PeRFlowSDXLAutoBlocks().get_workflow(name)
    assembled.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = PeRFlowTiledControlNetLoopDenoiser()
    tiled = run(workflow_pipeline(name, assembled), **inputs)
    assert torch.equal(run(workflow_pipeline(name, PeRFlowSDXLTileUpscalerBlocks()), **inputs), tiled)
    assert not torch.equal(tiled, run(workflow_pipeline(name), **workflow_inputs(name)))


@pytest.mark.parametrize("kind", [*PRESETS.values(), PeRFlowSDXLTileUpscalerBlocks])
def test_a_task_says_what_it_does_takes_and_gives(kind: type[Any]) -> None:
    blocks = kind()
    assert blocks.description and [param.name for param in blocks.outputs] == ["images"]
    assert all(param.description for param in [*blocks.inputs, *blocks.outputs])
    assert {"text_encoder", "denoise", "decode"} <= set(blocks.sub_blocks)
