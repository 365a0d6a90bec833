"""Stable Diffusion 1.5 and 2.1: every workflow beside diffusers' classic pipelines with a `PeRFlowScheduler`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, ModularPipeline, StableDiffusionPipeline

from perflow_blocks import (
    PeRFlowModularPipeline,
    PeRFlowPipelineBuilder,
    PeRFlowScheduler,
    PeRFlowSDAutoBlocks,
    PeRFlowSDModularPipeline,
    PeRFlowSDXLAutoBlocks,
)
from perflow_blocks.delta.extract import extract_delta, save_delta
from perflow_blocks.testing.tiny import (
    BETAS,
    load_tiny_ip_adapter,
    tiny_image,
    tiny_mask,
    tiny_sd_components,
    tiny_sd_controlnet,
    tiny_sd_unet,
)
from tests.checkpoints import save_checkpoint
from tests.conftest import count_unet_calls, generator

pytestmark = pytest.mark.behaviour

BASE: dict[str, Any] = {**BETAS, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
MODELS = {
    "sd15": (DDIMScheduler(**BASE), "diff_eps", 4.5),
    "sd21": (DDIMScheduler(**BASE, prediction_type="v_prediction"), "velocity", 7.5),
}
CLASSIC = {
    "text2image": "StableDiffusionPipeline",
    "image2image": "StableDiffusionImg2ImgPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "controlnet_text2image": "StableDiffusionControlNetPipeline",
    "controlnet_image2image": "StableDiffusionControlNetImg2ImgPipeline",
    "controlnet_inpainting": "StableDiffusionControlNetInpaintPipeline",
}
WORKFLOWS = [f"{prefix}{name}" for prefix in ("", "ip_adapter_") for name in CLASSIC]


def components(model: str, **changes: Any) -> dict[str, Any]:
    return {**tiny_sd_components(MODELS[model][0]), **changes}


def save_repository(folder: Path, model: str) -> Path:
    """A directory as diffusers' classic pipelines write it."""
    StableDiffusionPipeline(**components(model)).save_pretrained(folder)
    return folder


def pipeline(**parts: Any) -> Any:
    pipe: Any = PeRFlowSDAutoBlocks().init_pipeline()
    pipe.update_components(**{name: parts[name] for name in parts if name in pipe.components and parts[name]})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet(classic: Any) -> Any:
    classic.set_progress_bar_config(disable=True)
    return classic


def inputs_of(workflow: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"prompt": "a red star", "negative_prompt": "a ring", "output_type": "latent"}
    if "text2image" not in workflow:
        inputs |= {"image": tiny_image(1), "strength": 0.5}  # where the classic pipelines enter at a step too
    if "inpainting" in workflow:
        inputs |= {"mask_image": tiny_mask()}
    if "controlnet" in workflow:
        inputs |= {"control_image": tiny_image(3), "controlnet_conditioning_scale": 0.7}
    if "ip_adapter" in workflow:
        inputs |= {"ip_adapter_image": tiny_image(5)}
    return inputs


@pytest.mark.parametrize("workflow", WORKFLOWS)
@pytest.mark.parametrize("model", MODELS)
def test_a_workflow_draws_what_the_classic_pipeline_draws(model: str, workflow: str) -> None:
    scheduler, kind, scale = MODELS[model]
    parts = components(model)
    if "controlnet" in workflow:
        parts["controlnet"] = tiny_sd_controlnet()
    pipe = pipeline(**parts)
    if "ip_adapter" in workflow:
        load_tiny_ip_adapter(pipe)
        parts |= {"image_encoder": pipe.image_encoder, "feature_extractor": pipe.feature_extractor}
    calls = count_unet_calls(pipe)
    drawn = pipe(**inputs_of(workflow), noising="marginal", generator=generator()).images  # as the classic ones do
    assert calls == [2] * (8 if "text2image" in workflow else 4)
    assert (pipe.scheduler.config.prediction_type, pipe.guider.guidance_scale) == (kind, scale)

    inputs = {**inputs_of(workflow), "num_inference_steps": 8, "guidance_scale": scale}
    if "controlnet_text2image" in workflow:
        inputs["image"] = inputs.pop("control_image")
    parts["scheduler"] = PeRFlowScheduler.from_scheduler(scheduler, prediction_type=kind)
    classic = quiet(getattr(diffusers, CLASSIC[workflow.removeprefix("ip_adapter_")])(**parts))
    expected = classic(**inputs, generator=generator()).images
    assert (drawn - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_inpainting_with_nine_channels_paints_the_hole_as_the_classic_pipeline_does() -> None:
    parts = components("sd15", unet=tiny_sd_unet(in_channels=9))
    latents = {name: torch.randn(1, 4, 16, 16, generator=generator(7)) for name in ("image", "masked_image_latents")}
    hole = torch.nn.functional.interpolate(torch.from_numpy(np.array(tiny_mask()))[None, None] / 255.0, size=(16, 16))
    texts = {"prompt": "a red star", "negative_prompt": "a ring", "strength": 0.5, "output_type": "latent"}
    given = {"image_latents": latents["image"], "masked_image_latents": latents["masked_image_latents"], "mask": hole}
    drawn = pipeline(**parts)(**texts, **given, noising="marginal", generator=generator()).images
    parts["scheduler"] = PeRFlowScheduler.from_scheduler(parts["scheduler"], prediction_type="diff_eps")
    classic = quiet(diffusers.StableDiffusionInpaintPipeline(**parts))
    settings = {"num_inference_steps": 8, "guidance_scale": 4.5, "height": 32, "width": 32}
    expected = classic(**texts, **latents, mask_image=tiny_mask(), **settings, generator=generator()).images
    # Outside the hole our blocks put the known latents back at the end.
    assert ((drawn - expected) * hole).abs().max() <= 1e-4 * expected.abs().max()


def test_texts_are_encoded_as_in_the_classic_pipeline() -> None:
    parts = components("sd15")
    pipe, classic = pipeline(**parts), StableDiffusionPipeline(**parts)
    positive, negative = classic.encode_prompt(["a star", "a ring"], "cpu", 1, True, ["blur", "blur"])
    state = pipe(["a star", "a ring"], negative_prompt="blur", output_type="latent", generator=generator())
    assert torch.equal(state.prompt_embeds, positive) and torch.equal(state.negative_prompt_embeds, negative)
    again = pipe(prompt_embeds=positive, negative_prompt_embeds=negative, output_type="latent", generator=generator())
    assert torch.equal(again.images, state.images)
    # Without negative embeddings they are those of the empty text.
    embedded = pipe(prompt_embeds=positive, output_type="latent", generator=generator()).images
    assert torch.equal(embedded, pipe(["a star", "a ring"], output_type="latent", generator=generator()).images)


def test_clip_skip_leaves_layers_out() -> None:
    parts = components("sd15")
    with torch.no_grad():
        hidden = parts["text_encoder"](
            parts["tokenizer"](
                "a star", padding="max_length", max_length=parts["tokenizer"].model_max_length, return_tensors="pt"
            ).input_ids,
            output_hidden_states=True,
        ).hidden_states[-2]
        expected = parts["text_encoder"].final_layer_norm(hidden)
    state = pipeline(**parts)("a star", clip_skip=1, guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(state.prompt_embeds, expected)


@pytest.mark.parametrize("model", MODELS)
def test_a_classic_repository_loads_saves_and_comes_back(model: str, tmp_path: Path) -> None:
    place = save_repository(tmp_path / "classic", model)
    pipe = PeRFlowModularPipeline.from_pretrained(place)
    assert type(pipe) is PeRFlowSDModularPipeline and type(pipe.blocks) is PeRFlowSDAutoBlocks
    pipe.load_components()
    drawn = pipe(**inputs_of("inpainting"), generator=generator()).images
    pipe.save_pretrained(tmp_path / "saved")
    for load in (PeRFlowModularPipeline.from_pretrained, PeRFlowSDModularPipeline.from_pretrained):
        again = load(tmp_path / "saved")
        assert type(again) is PeRFlowSDModularPipeline
        again.load_components()
        assert torch.equal(again(**inputs_of("inpainting"), generator=generator()).images, drawn)
    plain = ModularPipeline.from_pretrained(str(tmp_path / "saved"), trust_remote_code=True)
    plain.load_components(dtype=torch.float32)
    assert torch.equal(plain(**inputs_of("inpainting"), generator=generator(), output="images"), drawn)


def test_models_of_a_classic_pipeline_are_shared() -> None:
    classic = StableDiffusionPipeline(**components("sd21"))
    pipe = PeRFlowModularPipeline.from_pipe(classic)
    assert type(pipe) is PeRFlowSDModularPipeline and pipe.unet is classic.unet
    pipe("a star", output_type="latent")
    assert pipe.scheduler.config.prediction_type == "velocity"


def test_the_builder_takes_the_preset_of_the_family(tmp_path: Path) -> None:
    place = save_repository(tmp_path / "classic", "sd21")
    pipe = PeRFlowPipelineBuilder().from_pretrained(place).build()
    assert type(pipe) is PeRFlowSDModularPipeline and type(pipe.blocks) is PeRFlowSDAutoBlocks
    expected = pipeline(**components("sd21"))("a star", output_type="latent", generator=generator()).images
    assert torch.equal(pipe("a star", output_type="latent", generator=generator()).images, expected)


def test_an_original_checkpoint_builds(tmp_path: Path) -> None:
    config, parts = save_repository(tmp_path / "classic", "sd15"), components("sd15")
    file = save_checkpoint(tmp_path / "tuned.safetensors", parts)
    pipe = PeRFlowPipelineBuilder().from_single_file(file, config=config).build()
    assert type(pipe) is PeRFlowSDModularPipeline
    for name in ("unet", "vae", "text_encoder"):
        expected = parts[name].state_dict()
        assert all(torch.equal(weight, expected[key]) for key, weight in getattr(pipe, name).state_dict().items())
    drawn = pipe("a star", output_type="latent", generator=generator()).images
    assert torch.equal(drawn, pipeline(**parts)("a star", output_type="latent", generator=generator()).images)


def test_a_prompt_cache_gives_what_the_encoder_gives(tmp_path: Path) -> None:
    chain = PeRFlowPipelineBuilder().from_pretrained(save_repository(tmp_path / "classic", "sd15"))
    plain, cached = chain.build(), chain.with_prompt_cache().build()
    expected = [plain(text, output_type="latent", generator=generator()).images for text in ("a star", "a ring")]
    for number in (0, 1, 0):
        text = ("a star", "a ring")[number]
        drawn = cached(text, output_type="latent", generator=generator())
        assert torch.equal(drawn.images, expected[number])
    embeds = {name: drawn.get(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
    assert torch.equal(cached(**embeds, output_type="latent", generator=generator()).images, expected[0])
    cache = cached.blocks.sub_blocks["text_encoder"]
    assert (cache.hits, cache.misses) == (1, 2)


def test_a_delta_in_the_published_layout_merges(tmp_path: Path) -> None:
    """A UNet at the repository's root whose weights are the differences, `variant="v0-1"`."""
    base, student = tiny_sd_unet(0), tiny_sd_unet(1)
    difference = tiny_sd_unet(2)
    difference.load_state_dict(extract_delta(student, base))
    difference.save_pretrained(tmp_path, variant="v0-1")
    parts = components("sd15")
    merged = pipeline(**{**parts, "unet": student})("a star", output_type="latent", generator=generator()).images
    pipe = pipeline(**parts)
    pipe.update_components(delta=str(tmp_path), delta_variant="v0-1")
    drawn = pipe("a star", output_type="latent", generator=generator()).images
    assert (drawn - merged).abs().max() <= 1e-3 * merged.abs().max()


def test_the_recipe_of_a_delta_wins(tmp_path: Path) -> None:
    from perflow_blocks.delta.recipe import DeltaRecipe

    recipe = DeltaRecipe(prediction_type="ddim_eps", num_inference_steps=5, guidance_scale=2.5)
    save_delta(extract_delta(tiny_sd_unet(1), tiny_sd_unet(0)), tmp_path / "delta.safetensors", recipe)
    pipe = pipeline(**components("sd21"))
    calls = count_unet_calls(pipe)
    pipe("a star", delta=tmp_path / "delta.safetensors", output_type="latent")
    assert (len(calls), pipe.guider.guidance_scale) == (5, 2.5)
    assert pipe.scheduler.config.prediction_type == "ddim_eps"


def test_a_lora_of_the_classic_pipeline_loads_and_unloads() -> None:
    pytest.importorskip("peft")
    pipe = pipeline(**components("sd15"))
    before = pipe("a star", output_type="latent", generator=generator()).images
    lora = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            lora[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator(1))
            lora[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator(2))
    for name, module in pipe.text_encoder.named_modules():
        if name.endswith("q_proj"):
            lora[f"text_encoder.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator(3))
            lora[f"text_encoder.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator(4))
    pipe.load_lora_weights(lora, adapter_name="style")
    assert pipe.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
    assert not torch.equal(pipe("a star", output_type="latent", generator=generator()).images, before)
    pipe.unload_lora_weights()
    assert torch.equal(pipe("a star", output_type="latent", generator=generator()).images, before)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({}, "prompt is missing"),
    "an input of SDXL": ({"prompt": "a star", "prompt_2": "b"}, "prompt_2 is not an input of this pipeline"),
    "pooled embeddings": ({"pooled_prompt_embeds": torch.zeros(1, 8)}, "pooled_prompt_embeds is not an input"),
    "embeddings of SDXL": ({"prompt_embeds": torch.zeros(1, 16, 64)}, "prompt_embeds has shape"),
    "strength alone": ({"prompt": "a star", "strength": 0.5}, "strength is given without image"),
    "no steps": ({"prompt": "a star", "num_inference_steps": 0}, "num_inference_steps=0"),
    "a control image": ({"prompt": "a star", "control_image": tiny_image()}, "controlnet not loaded"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_a_model_runs(mistake: str) -> None:
    inputs, message = MISTAKES[mistake]
    pipe = pipeline(**components("sd15"))
    calls = count_unet_calls(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(**inputs)
    assert calls == []


def test_the_preset_has_the_names_of_sdxl_and_no_inputs_of_its_conditioning() -> None:
    blocks, sdxl = PeRFlowSDAutoBlocks(), PeRFlowSDXLAutoBlocks()
    assert list(blocks.sub_blocks) == list(sdxl.sub_blocks)
    assert blocks.available_workflows == WORKFLOWS_OF_SDXL
    names = {entry.name for entry in blocks.inputs}
    assert names < {entry.name for entry in sdxl.inputs}
    assert not {name for name in names if "pooled" in name or "time_ids" in name or name.endswith("_2")}
    pruned = blocks.get_workflow("text2image")
    assert type(pruned.init_pipeline()) is PeRFlowSDModularPipeline
    assert "pooled_prompt_embeds" not in {entry.name for entry in pruned.inputs}


WORKFLOWS_OF_SDXL = [name for name in PeRFlowSDXLAutoBlocks().available_workflows if "union" not in name]
