"""The builder's delta: every layout of it is checked first, and what was said of it is saved with the pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ComponentsManager
from safetensors.torch import load_file, save_file

from perflow_blocks import PeRFlowPipelineBuilder, PeRFlowSDXLAutoBlocks, merge_delta
from perflow_blocks.blocks import merge_delta as block
from perflow_blocks.blocks.declare import declared
from perflow_blocks.blocks.specs import delta_config_specs
from perflow_blocks.builder.loading import build_pipeline
from perflow_blocks.builder.plan import make_plan
from perflow_blocks.delta.merge import merge_records
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_sd_unet, tiny_sdxl_unet
from tests.blocks.conftest import write_delta
from tests.conftest import builder, latents, make_pipeline, problems

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_delta(tmp_path_factory.mktemp("delta") / "delta.safetensors")


def shards(folder: Path, delta: Path) -> Path:
    folder.mkdir()
    tensors = load_file(delta)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{WEIGHTS}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", ["folder", "variant", "shards", "index of shards", "prefix"])
def test_a_delta_comes_in_every_layout_of_weights(
    repository: Path, tmp_path: Path, delta: Path, loads: list[str], layout: str
) -> None:
    folder, variant = tmp_path / "delta", None
    match layout:
        case "shards":
            shards(folder, delta)
        case "index of shards":
            folder = shards(folder, delta) / f"{WEIGHTS}.safetensors.index.json"
        case "prefix":
            folder = tmp_path / "prefixed.safetensors"
            save_file({f"module.{name}": tensor for name, tensor in load_file(delta).items()}, folder)
        case _:
            variant = "v0-1" if layout == "variant" else None
            folder.mkdir()
            shutil.copy(delta, folder / ".".join(filter(None, [WEIGHTS, variant, "safetensors"])))
            shutil.copy(delta, folder / f"{WEIGHTS}.v0-2.safetensors")
    chain = builder(repository).with_delta(folder, variant=variant)
    assert chain.problems() == [] and loads == []
    assert torch.equal(latents(chain.build()), latents(make_pipeline(), delta=delta))


def test_a_delta_of_another_architecture_is_told_in_every_layout(
    repository: Path, tmp_path: Path, loads: list[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_file(tiny_sd_unet().state_dict(), other)
    chain = builder(repository).with_delta(shards(tmp_path / "shards", other))
    assert "shards does not fit this UNet2DConditionModel: " in problems(chain)
    assert "no_variant" in problems(builder(repository).with_delta(tmp_path / "shards", variant="no_variant"))
    assert loads == []


def test_the_scale_is_saved_with_the_pipeline(repository: Path, tmp_path: Path, delta: Path) -> None:
    pipe: Any = builder(repository).with_delta(delta, 0.5).build()
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "modular_model_index.json").read_text())
    assert (index["delta"], index["delta_scale"]) == (f"delta/{delta.name}", 0.5)
    expected = latents(make_pipeline(), delta=delta, delta_scale=0.5)
    again = builder(tmp_path / "saved")
    assert f"{delta.name} at scale 0.5" in again.describe()
    assert torch.equal(latents(again.build()), expected)
    blocks: Any = PeRFlowSDXLAutoBlocks().init_pipeline(str(tmp_path / "saved"))
    blocks.load_components()
    assert torch.equal(latents(blocks), expected)
    assert not torch.equal(expected, latents(make_pipeline(), delta=delta))


def test_the_steps_for_a_delta_may_not_disagree(repository: Path, delta: Path) -> None:
    chain = builder(repository).with_delta(delta)
    for name, value in {"delta": str(delta), "delta_scale": 0.5, "delta_variant": "fp16"}.items():
        assert f"with_delta and with_config({name}=...) are both given" in problems(chain.with_config(**{name: value}))
    for other in (chain.with_config(delta=None), builder(repository).with_config(delta=None).with_delta(delta)):
        assert other.build().config.delta == str(delta)
    built = builder(repository).with_config(delta=delta, delta_scale=0.5).build()
    assert torch.equal(latents(built), latents(make_pipeline(), delta=delta, delta_scale=0.5))


class OwnMerge(block.PeRFlowMergeDeltaStep):
    """A merge block of a user's own."""


def test_a_merge_block_of_ones_own_is_kept(repository: Path, delta: Path) -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks["merge_delta"] = OwnMerge()
    pipe = builder(repository).with_blocks(blocks).with_delta(delta, 0.5).build()
    assert type(pipe.blocks.sub_blocks["merge_delta"]) is OwnMerge
    assert torch.equal(latents(pipe), latents(make_pipeline(), delta=delta, delta_scale=0.5))


def test_a_merge_block_that_knows_no_scale_is_told(repository: Path, delta: Path) -> None:
    class Fixed(block.PeRFlowMergeDeltaStep):
        expected_configs = declared(*(spec for spec in delta_config_specs() if spec.name != "delta_scale"))

    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks["merge_delta"] = Fixed()
    chain = builder(repository).with_blocks(blocks)
    assert chain.with_delta(delta).problems() == []
    assert "Fixed takes no delta_scale=0.5" in problems(chain.with_delta(delta, 0.5))


def test_a_given_unet_that_holds_another_delta_is_told(repository: Path, tmp_path: Path, loads: list[str]) -> None:
    first = write_delta(tmp_path / "first.safetensors", DeltaRecipe(num_inference_steps=5))
    tensors = {name: tensor / 2 for name, tensor in load_file(first).items()}
    save_file(tensors, tmp_path / "second.safetensors", DeltaRecipe(num_inference_steps=3).to_metadata())
    unet = tiny_sdxl_unet()
    merge_delta(unet, first)
    chain = builder(repository).with_unet(unet)
    text = problems(chain.with_delta(tmp_path / "second.safetensors"))
    assert "first.safetensors is merged into the UNet already, at scale 1; call unmerge_delta" in text
    assert loads == []
    shutil.copy(first, tmp_path / "copy.safetensors")
    assert chain.with_delta(tmp_path / "copy.safetensors").problems() == []


def test_layers_that_come_and_go_have_the_delta_merged_once(
    repository: Path, delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU as the device, where nothing moves, but all the hooks run."""
    merged: list[float] = []

    def counted(unet: Any, weights: Any, scale: float) -> Any:
        merged.append(scale)
        return merge_delta(unet, weights, scale)

    monkeypatch.setattr(block, "merge_delta", counted)
    manager = ComponentsManager()
    chain: PeRFlowPipelineBuilder = builder(repository).with_delta(delta, 0.5)
    plan = make_plan(chain.settings, manager)
    pipe = build_pipeline(replace(plan, settings=replace(plan.settings, offload="group")), manager, None)
    assert any(hasattr(module, "_diffusers_hook") for module in pipe.unet.modules())
    expected = latents(make_pipeline(), delta=delta, delta_scale=0.5)
    merged.clear()
    torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-3)
    assert merged == [0.5]
    assert [record.scale for record in merge_records(pipe.unet)] == [0.5]
    latents(pipe, delta=False)
    torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-3)
