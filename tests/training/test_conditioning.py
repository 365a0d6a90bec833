"""What the UNets are told: as the teacher's own pipeline encodes it, for both families, and kept where it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from perflow_blocks.testing.tiny import tiny_sd_components, tiny_sdxl_components, tiny_vae
from perflow_blocks.training.buckets import TrainingBatch
from perflow_blocks.training.conditioning import PromptEncoder, batch_time_ids, cast
from perflow_blocks.training.config import ModelConfig
from perflow_blocks.training.families import SD, SDXL, family_of
from perflow_blocks.training.latents import LatentEncoder
from perflow_blocks.training.teacher_source import open_teacher
from tests.training.conftest import save_teacher

CPU = torch.device("cpu")


def sdxl(zeros: bool = True) -> Any:
    return StableDiffusionXLPipeline(
        **tiny_sdxl_components(), force_zeros_for_empty_prompt=zeros, add_watermarker=False
    )


def encoder_of(pipeline: Any, cache: int = 8) -> PromptEncoder:
    added = isinstance(pipeline, StableDiffusionXLPipeline)
    return PromptEncoder(pipeline, CPU, added_conditions=added, cache=cache)


def test_sdxl_prompts_are_encoded_as_the_pipeline_does() -> None:
    pipeline = sdxl()
    encoder, prompts = encoder_of(pipeline), ["a cat", "a dog", "a cat"]
    got = encoder.conditioning(encoder.rows(prompts), torch.zeros(3, 6))
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(got.prompt_embeds, embeds)
    torch.testing.assert_close(got.added["text_embeds"], pooled)
    assert not encoder.empty.prompt_embeds.any() and encoder.empty.pooled is not None


def test_the_empty_prompt_is_the_pipeline_s() -> None:
    pipeline = sdxl(zeros=False)
    _, empty, _, empty_pooled = pipeline.encode_prompt("x", do_classifier_free_guidance=True)
    encoder = encoder_of(pipeline)
    assert encoder.empty.pooled is not None and empty.any()
    torch.testing.assert_close(encoder.empty.prompt_embeds, empty[0])
    torch.testing.assert_close(encoder.empty.pooled, empty_pooled[0])


def test_stable_diffusion_has_no_added_conditions() -> None:
    pipeline = StableDiffusionPipeline(**tiny_sd_components())
    encoder = encoder_of(pipeline)
    got = encoder.conditioning(encoder.dropped(encoder.rows(["a cat", "a dog"]), [False, True]), torch.zeros(2, 6))
    embeds, empty = pipeline.encode_prompt(["a cat"], CPU, 1, True)
    assert not got.added
    torch.testing.assert_close(got.prompt_embeds, torch.cat([embeds, empty]))


def test_time_ids_are_original_corner_target_each_height_first() -> None:
    batch = TrainingBatch(
        prompts=["a"], pixels=None, original_sizes=[(100, 200)], crop_tops_lefts=[(3, 4)], target_sizes=[(64, 32)]
    )
    assert batch_time_ids(encoder_of(sdxl()), batch).tolist() == [[100, 200, 3, 4, 64, 32]]


def test_half_precision_leaves_time_ids_as_they_are() -> None:
    encoder = encoder_of(sdxl())
    ids = torch.tensor([[1365.0, 771, 5, 7, 1021, 1027]])
    half = cast(encoder.conditioning(encoder.rows(["a"]), ids), torch.bfloat16)
    assert half.prompt_embeds.dtype == half.added["text_embeds"].dtype == torch.bfloat16
    assert torch.equal(half.added["time_ids"], ids)


def test_prompts_are_encoded_once_while_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(sdxl(), cache=2)
    asked: list[str] = []
    original = encoder._encode

    def encode(prompt: str) -> Any:
        asked.append(prompt)
        return original(prompt)

    monkeypatch.setattr(encoder, "_encode", encode)
    first = encoder.rows(["a", "b", "a"])
    assert asked == ["a", "b"]
    encoder.rows(["a"])
    encoder.rows(["c"])  # b goes, as a was used since
    again = encoder.rows(["a", "b"])
    assert asked == ["a", "b", "c", "b"]
    torch.testing.assert_close(again[1].prompt_embeds, first[1].prompt_embeds)


def test_the_text_encoders_go_back_when_all_prompts_that_were_missing_are_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []
    original = PromptEncoder._encode

    def encode(self: PromptEncoder, prompt: str, *, negative: bool = False) -> Any:
        did.append(prompt)
        return original(self, prompt, negative=negative)

    monkeypatch.setattr(PromptEncoder, "_encode", encode)
    encoder = PromptEncoder(sdxl(), CPU, added_conditions=True, cache=8, offload=lambda: did.append("back"))
    assert did == ["", "back"]
    encoder.rows(["a", "b", "a"])
    encoder.rows(["b", "a"])
    encoder.rows(["a", "c"])
    assert did == ["", "back", "a", "b", "back", "c", "back"]


def test_latents_are_the_vae_s_scaled_and_kept_by_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, pixels = tiny_vae(), torch.rand(3, 3, 32, 32) * 2 - 1
    kept, plain = LatentEncoder(vae, CPU, cache=2), LatentEncoder(vae, CPU)
    expected = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(5)) * vae.config.scaling_factor
    for encoder in (plain, kept, kept):
        got = encoder.encode(pixels, torch.Generator().manual_seed(5))
        torch.testing.assert_close(got, expected)
    encoded: list[int] = []
    original = kept._encode

    def encode(rows: torch.Tensor) -> torch.Tensor:
        encoded.append(len(rows))
        return original(rows)

    monkeypatch.setattr(kept, "_encode", encode)
    kept.encode(pixels[1:], torch.Generator())
    assert encoded == []
    kept.encode(pixels[:1], torch.Generator())
    assert encoded == [1]  # the one that had to go


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_a_teacher_s_parts_are_read_from_its_folders(family: str, tmp_path: Path) -> None:
    path = save_teacher(tmp_path / "teacher", family)
    source = open_teacher(ModelConfig(teacher=str(path)))
    assert source.family is (SDXL if family == "sdxl" else SD)
    assert source.label == "teacher" and source.vae_factor == 2
    assert source.load_unet().config.cross_attention_dim == source.unet_config["cross_attention_dim"]
    encoder = encoder_of(source.load_text_pipeline(torch.float32))
    original = encoder_of(sdxl() if family == "sdxl" else StableDiffusionPipeline(**tiny_sd_components()))
    for ours, theirs in zip(encoder.rows(["a cat"]), original.rows(["a cat"]), strict=True):
        torch.testing.assert_close(ours.prompt_embeds, theirs.prompt_embeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"in_channels": 9}, "9 channels"),
        ({"time_cond_proj_dim": 256}, "itself distilled"),
        ({"addition_embed_type": "image_hint"}, "image_hint"),
    ],
)
def test_other_families_are_refused(change: dict[str, Any], message: str) -> None:
    config = {"_class_name": "UNet2DConditionModel", "in_channels": 4}
    assert family_of({**config, "cross_attention_dim": 1024}).guidance_scale == 7.5
    assert family_of(config) is SD and family_of({**config, "addition_embed_type": "text_time"}) is SDXL
    with pytest.raises(ValueError, match=message):
        family_of({**config, **change})
