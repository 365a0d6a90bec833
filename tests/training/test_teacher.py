"""The teacher: read from folders, and prompts and images encoded as its own pipeline encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import UserCpuOffloadHook
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from perflow_blocks.testing.tiny import tiny_sd_components, tiny_sdxl_components, tiny_vae
from perflow_blocks.training.config import ModelConfig
from perflow_blocks.training.loop import Session
from perflow_blocks.training.teacher import (
    SD,
    SDXL,
    LatentEncoder,
    PromptEncoder,
    Sizes,
    cast,
    family_of,
    open_teacher,
)
from tests.training.conftest import tiny_config

CPU = torch.device("cpu")
SIZES: Sizes = ((100, 200), (3, 4), (64, 32))


def pipeline_of(family: str) -> Any:
    if family == "sd":
        return StableDiffusionPipeline(**tiny_sd_components())
    zeros = family == "sdxl"
    return StableDiffusionXLPipeline(
        **tiny_sdxl_components(), force_zeros_for_empty_prompt=zeros, add_watermarker=False
    )


@pytest.mark.parametrize("family", ["sdxl", "sdxl without zeros", "sd"])
def test_prompts_are_encoded_as_the_pipeline_does(family: str) -> None:
    pipeline = pipeline_of(family)
    encoder = PromptEncoder(pipeline, CPU, 8)
    got = encoder.conditioning(["a cat", "a dog", "a cat"], [SIZES] * 3, [False, True, False])
    empty = encoder.empty(got)
    if family == "sd":
        embeds, negative = pipeline.encode_prompt(["a cat"], CPU, 1, True)
        assert not got.added and not empty.added
    else:
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt("a cat", do_classifier_free_guidance=True)
        torch.testing.assert_close(got.added["text_embeds"], torch.cat([pooled, negative_pooled, pooled]))
        torch.testing.assert_close(empty.added["text_embeds"], negative_pooled.expand(3, -1))
        assert bool(negative.any()) == (family != "sdxl")
        for given in (got, empty):  # original size, corner, target size, each height first
            assert given.added["time_ids"].tolist() == [[100, 200, 3, 4, 64, 32]] * 3
    torch.testing.assert_close(got.prompt_embeds, torch.cat([embeds, negative, embeds]))
    torch.testing.assert_close(empty.prompt_embeds, negative.expand(3, -1, -1))


def test_half_precision_leaves_time_ids_as_they_are() -> None:
    odd: Sizes = ((1365, 771), (5, 7), (1021, 1027))
    half = cast(PromptEncoder(pipeline_of("sdxl"), CPU, 8).conditioning(["a"], [odd]), torch.bfloat16)
    assert half.prompt_embeds.dtype == half.added["text_embeds"].dtype == torch.bfloat16
    assert half.added["time_ids"].tolist() == [[1365, 771, 5, 7, 1021, 1027]]


def test_prompts_are_encoded_once_while_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, did = pipeline_of("sdxl"), list[str]()
    original = pipeline.encode_prompt

    def encode(**given: Any) -> Any:
        did.append(given["prompt"][0])
        return original(**given)

    monkeypatch.setattr(pipeline, "encode_prompt", encode)
    encoder = PromptEncoder(pipeline, CPU, 2, offload=lambda: did.append("back"))
    for prompts in (["a", "b", "a"], ["a"], ["c"], ["a", "b"]):  # b has to go, as a was used since
        encoder.conditioning(prompts, [SIZES] * len(prompts))
    assert did == ["", "back", "a", "b", "back", "c", "back", "b", "back"]


def test_latents_are_the_vae_s_scaled() -> None:
    vae, pixels = tiny_vae(), torch.rand(3, 3, 32, 32) * 2 - 1
    expected = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(5)) * vae.config.scaling_factor
    found = LatentEncoder(vae, CPU).encode(pixels, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_its_parts_are_read_from_its_folders(family: str, teachers: dict[str, Path]) -> None:
    source = open_teacher(ModelConfig(teacher=str(teachers[family])))
    assert source.family is (SDXL if family == "sdxl" else SD)
    assert source.label == family and source.vae_factor == 2 and not source.on_hub
    text, original = source.load_text_pipeline(torch.float32), pipeline_of(family)
    ours, theirs = (PromptEncoder(pipe, CPU, 0).conditioning(["a cat"], [SIZES]) for pipe in (text, original))
    torch.testing.assert_close(ours.prompt_embeds, theirs.prompt_embeds)
    weights = original.unet.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in source.load_unet().state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"in_channels": 9}, "in_channels=9"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ({"addition_embed_type": "image_hint"}, "image_hint"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    config = {"_class_name": "UNet2DConditionModel", "in_channels": 4}
    assert family_of({**config, "cross_attention_dim": 1024}).guidance_scale == 7.5
    assert family_of(config) is SD and family_of({**config, "addition_embed_type": "text_time"}) is SDXL
    with pytest.raises(ValueError, match=message):
        family_of({**config, **change})


@pytest.mark.parametrize("offload", ["none", "encoders", "all"])
def test_what_is_offloaded_leaves_the_device_after_use(
    offload: str, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    taken_back: list[str] = []
    original = UserCpuOffloadHook.offload

    def note(self: Any) -> None:
        taken_back.append(type(self.model).__name__)
        original(self)

    monkeypatch.setattr(UserCpuOffloadHook, "offload", note)
    session = Session(tiny_config(tmp_path, teachers["sdxl"], teacher__offload=offload))
    encoders = [] if offload == "none" else ["CLIPTextModel", "CLIPTextModelWithProjection"]
    assert taken_back == encoders  # after the empty prompt
    pairs = session.pairs.next(0, 0.0, session.student)
    vae, unet = (
        ([] if offload == "none" else ["AutoencoderKL"]),
        (["UNet2DConditionModel"] if offload == "all" else []),
    )
    assert taken_back == [*encoders, *vae, *encoders, *unet]
    assert pairs.z_end.isfinite().all()
