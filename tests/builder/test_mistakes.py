"""What is cheap to know is told before anything is loaded, and all of it at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from perflow_blocks import PeRFlowPipelineBuilder, PeRFlowSDXLAutoBlocks, WindowLogStep
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing.tiny import tiny_controlnet, tiny_sd_unet, tiny_sdxl_unet
from tests.blocks.test_features_lora import write_lora
from tests.conftest import builder, problems

SD = "sd_delta.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of another architecture, a damaged one, and a directory without models."""
    folder = tmp_path_factory.mktemp("files")
    save_delta(tiny_sd_unet().state_dict(), folder / SD)
    (folder / "broken.safetensors").write_bytes((folder / SD).read_bytes()[:-5])
    return folder


def without(*names: str) -> PeRFlowSDXLAutoBlocks:
    blocks = PeRFlowSDXLAutoBlocks()
    for name in names:
        blocks.sub_blocks.pop(name)
    return blocks


Mistake = Callable[[PeRFlowPipelineBuilder, Path], PeRFlowPipelineBuilder]
MISTAKES: dict[str, tuple[Mistake, str]] = {
    "component": (lambda it, at: it.with_component("unett", "a/b"), "take no component unett; they take .*unet"),
    "workflow's component": (
        lambda it, at: it.with_workflow("text2image").with_component("controlnet", "a/b"),
        "take no component controlnet",
    ),
    "directory": (lambda it, at: it.with_vae(at / "nothing"), "vae: .*nothing does not exist"),
    "folder": (lambda it, at: it.with_vae(at, subfolder="vae"), "vae: .*/vae does not exist"),
    "repository": (lambda it, at: it.from_pretrained(at / "nowhere"), "nowhere.*modular_model_index.json"),
    "no repository": (lambda it, at: it.from_pretrained(at), "modular_model_index.json.*or 'model_index.json'"),
    "no source": (lambda it, at: PeRFlowPipelineBuilder(), "unet, vae, .*tokenizer_2 missing; call from_pretrained"),
    "checkpoint": (lambda it, at: it.from_single_file(at / "x.safetensors"), "unet: .*x.safetensors does not exist"),
    "checkpoint of folders": (lambda it, at: it.from_single_file(at), "is a directory; pass a file, or call from_pre"),
    "lora": (lambda it, at: it.with_lora(at / "x.safetensors"), "with_lora: .*x.safetensors does not exist"),
    "ip-adapter": (
        lambda it, at: it.with_ip_adapter(at, subfolder="", weight_name="ip.bin", image_encoder_folder=None),
        "with_ip_adapter: .*ip.bin does not exist",
    ),
    "dtype of a model": (
        lambda it, at: it.with_unet(tiny_sdxl_unet().half()).with_controlnet(tiny_controlnet()),
        r"unet is torch.float16, other models are torch.float32|controlnet is torch.float32, other models are",
    ),
    "dtype": (lambda it, at: it.from_single_file(at / "x", dtype=torch.int8), "dtype=torch.int8 must be 'auto'"),
    "device": (lambda it, at: it.on("gpu"), r"on\('gpu'\): "),
    "delta": (lambda it, at: it.with_delta(at / "none.safetensors"), "none.safetensors does not exist"),
    "broken delta": (lambda it, at: it.with_delta(at / "broken.safetensors"), "complete safetensors file"),
    "family of delta": (lambda it, at: it.with_delta(at / SD), f"{SD} does not fit this UNet2DC.*: .*add_embedding"),
    "family of delta for a model": (
        lambda it, at: it.with_unet(tiny_sdxl_unet()).with_delta(at / SD),
        "does not fit this UNet2DConditionModel",
    ),
    "delta without block": (
        lambda it, at: it.with_blocks(without("merge_delta")).with_delta(at / SD),
        "the blocks take no delta=",
    ),
    "config": (lambda it, at: it.with_config(windows=4), "take no windows=4; they take .*num_time_windows"),
    "config's delta": (lambda it, at: it.with_config(delta=False), "the configuration's delta=False"),
    "guider": (lambda it, at: it.with_guider(2.0), "guider: .*float"),
    "guidance": (lambda it, at: it.with_guidance(2.0, start=0.5, stop=0.2), "guider: .*stop"),
    "two scales": (lambda it, at: it.with_guidance(2.0).with_config(guidance_scale=3.0), "are both given"),
    "attention": (lambda it, at: it.with_attention("fast"), "attention strategy 'fast' is unknown"),
    "attention's blocks": (
        lambda it, at: it.with_blocks(without("apply_attention")).with_attention("sliced"),
        "the blocks take no component attention",
    ),
    "workflow": (lambda it, at: it.with_workflow("text2img"), "with_workflow: .*'text2img'.*text2image"),
    "place": (
        lambda it, at: it.insert_block("log", WindowLogStep, before="denoise_step"),
        r"insert_block\('log'\): .*finite_guard.*none of them 'denoise_step'",
    ),
    "no place": (lambda it, at: it.insert_block("log", WindowLogStep), "before=None and after=None"),
    "two places": (
        lambda it, at: it.insert_block("log", WindowLogStep, before="solver", after="decode"),
        "exactly one of them",
    ),
    "name": (lambda it, at: it.insert_block("decode", WindowLogStep, before="decode"), "called 'decode' already"),
    "cache size": (lambda it, at: it.with_prompt_cache(0), "with_prompt_cache: max_entries=0"),
    "cache": (lambda it, at: it.with_blocks(without("text_encoder")).with_prompt_cache(), "the blocks have no"),
    "offload": (lambda it, at: it.offload("disk"), r"offload\('disk'\) must be 'auto', 'group' or None"),
    "offload here": (lambda it, at: it.on("cpu").offload("group"), "needs another device than the CPU"),
    "offload and compile": (lambda it, at: it.on("meta").offload("auto").with_compile(), "leave one of the two out"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_loaded(
    repository: Path, files: Path, loads: list[str], mistake: str
) -> None:
    step, text = MISTAKES[mistake]
    built = step(builder(repository), files)
    with pytest.raises(ValueError, match=text):
        built.build()
    assert loads == []
    assert built.components_manager.components == {}
    assert "problem: " in built.describe()


def test_all_mistakes_are_told_at_once(repository: Path, files: Path) -> None:
    chosen = ["component", "family of delta", "config", "place", "attention", "device", "lora", "folder"]
    built = builder(repository)
    for name in chosen:
        built = MISTAKES[name][0](built, files)
    assert len(built.problems()) == len(chosen)
    assert f"for {len(chosen)} reasons" in problems(built)


def test_a_lora_for_blocks_without_a_unet_is_not_ignored(repository: Path, tmp_path: Path) -> None:
    blocks = PeRFlowSDXLAutoBlocks().sub_blocks["text_encoder"]
    with pytest.raises((AttributeError, ValueError)):
        builder(repository).with_blocks(blocks).with_lora(write_lora(tmp_path / "ink", 1)).build()


def test_mistakes_of_one_step_are_told_by_it(files: Path) -> None:
    start = PeRFlowPipelineBuilder()
    with pytest.raises(ValueError, match="vae: subfolder must go with a directory or repository"):
        start.with_vae(AutoencoderKL(), subfolder="x")
    with pytest.raises(ValueError, match="two LoRAs are called 'x'; pass adapter_name="):
        start.with_lora(files, weight_name="a/x.safetensors").with_lora(files, weight_name="b/x.safetensors")


def test_a_part_that_does_not_load_leaves_nothing_in_the_manager(repository: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(repository, tmp_path / "tiny")
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    built = builder(folder)
    with pytest.raises(ValueError, match="Unable to load text_encoder_2"):
        built.build()
    assert built.components_manager.components == {}
