"""Builders with one ComponentsManager: what is shared, and what must not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ComponentsManager

from perflow_blocks import PeRFlowPipelineBuilder, PeRFlowSDXLAutoBlocks
from perflow_blocks.testing.tiny import tiny_sdxl_components, tiny_sdxl_unet
from tests.blocks.conftest import write_delta
from tests.blocks.test_features_lora import write_lora
from tests.conftest import WHOLE, builder, latents, make_pipeline

Change = Callable[[PeRFlowPipelineBuilder, Path], PeRFlowPipelineBuilder]
LORA_MODELS = ["CLIPTextModel", "CLIPTextModelWithProjection", "UNet2DConditionModel"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta and a LoRA."""
    folder = tmp_path_factory.mktemp("files")
    write_delta(folder / "delta.safetensors")
    write_lora(folder / "lora", seed=1)
    return folder


def test_two_builders_with_one_manager_load_once(repository: Path, loads: list[str]) -> None:
    manager = ComponentsManager()
    first = builder(repository, components_manager=manager).build()
    second = builder(repository, components_manager=manager).with_guidance(1.5).build()
    assert sorted(loads) == WHOLE
    assert all(getattr(first, name) is getattr(second, name) for name in tiny_sdxl_components())
    assert first.guider is not second.guider


def test_stages_load_what_they_take(repository: Path, loads: list[str]) -> None:
    whole = builder(repository)
    text = PeRFlowSDXLAutoBlocks().sub_blocks["text_encoder"]
    stage = whole.with_blocks(text).build()
    assert sorted(loads) == ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer", "CLIPTokenizer"]
    pipe = whole.build()
    assert sorted(loads) == WHOLE
    assert pipe.text_encoder is stage.text_encoder


def test_describe_says_what_is_shared(repository: Path) -> None:
    chain = builder(repository)
    assert "shared" not in chain.describe()
    chain.build()
    assert chain.describe().count("shared, from") == len(WHOLE)
    assert "shared" not in builder(repository).describe()  # of another manager


CHANGES: dict[str, tuple[Change, list[str]]] = {
    "guidance": (lambda chain, files: chain.with_guidance(1.5), []),
    "attention": (lambda chain, files: chain.with_attention("sliced"), []),
    "workflow": (lambda chain, files: chain.with_workflow("text2image"), []),
    "delta": (lambda chain, files: chain.with_delta(files / "delta.safetensors"), ["UNet2DConditionModel"]),
    "lora": (lambda chain, files: chain.with_lora(files / "lora", 0.5), LORA_MODELS),
    "compiled": (
        lambda chain, files: chain.with_compile(backend="eager"),
        ["UNet2DConditionModel", "AutoencoderKL"],
    ),
    "dtype": (
        lambda chain, files: chain.from_pretrained(chain.settings.repository.location, dtype=torch.bfloat16),
        [*LORA_MODELS, "AutoencoderKL"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_model_is_not_shared(repository: Path, loads: list[str], files: Path, change: str) -> None:
    """And the pipelines do not disturb one another, in whatever order they run."""
    step, expected = CHANGES[change]
    plain = builder(repository)
    changed = step(plain, files)
    one = plain.build()
    loads.clear()
    two = changed.build()
    assert sorted(loads) == sorted(expected)
    alone = latents(step(builder(repository), files).build())
    loads.clear()
    assert torch.equal(latents(two), alone)
    assert torch.equal(latents(one), latents(make_pipeline()))
    assert torch.equal(latents(changed.build()), alone)  # a second build of the same shares all of it
    assert loads == []


def test_what_was_changed_in_type_is_loaded_again(repository: Path, loads: list[str]) -> None:
    chain = builder(repository)
    chain.build().unet.to(torch.float16)
    loads.clear()
    assert chain.build().unet.dtype == torch.float32
    assert loads == ["UNet2DConditionModel"]


def test_given_models_are_not_changed_twice(repository: Path, files: Path) -> None:
    chain = builder(repository).with_unet(tiny_sdxl_unet()).with_lora(files / "lora", 0.5)
    first = latents(chain.build())
    assert torch.equal(latents(chain.build()), first)
    assert torch.equal(first, latents(builder(repository).with_lora(files / "lora", 0.5).build()))


def test_models_with_a_lora_are_shared_together_or_not_at_all(repository: Path, files: Path) -> None:
    """Since diffusers loads it into all of them: what had it already would have it twice."""
    chain = builder(repository).with_lora(files / "lora", 0.5)
    second_encoder = tiny_sdxl_components()["text_encoder_2"]
    first = chain.with_text_encoder(second_encoder, number=2).build()
    pipe = chain.build()
    assert pipe.unet is not first.unet
    assert pipe.vae is first.vae
    assert torch.equal(latents(pipe), latents(builder(repository).with_lora(files / "lora", 0.5).build()))


def test_a_collection_holds_the_components(repository: Path) -> None:
    manager = ComponentsManager()
    pipe = builder(repository, components_manager=manager, collection="sdxl").build()
    assert manager.get_one(name="unet", collection="sdxl") is pipe.unet


def test_the_manager_moves_models_to_its_device(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a manager that notes what it is asked for, since a machine may have no accelerator."""
    asked: list[Any] = []
    monkeypatch.setattr(ComponentsManager, "enable_auto_cpu_offload", lambda self, device: asked.append(device))
    monkeypatch.setattr("perflow_blocks.builder.placement._device", lambda settings, problems: torch.device("meta"))
    pipe = builder(repository).on("cuda").offload("auto").build()
    assert asked == [torch.device("meta")]
    assert pipe.unet.device.type == "cpu"
