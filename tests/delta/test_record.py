"""The merge record: in the configuration, through saving and loading, and gone when the delta is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from perflow_blocks import extract_delta, merge_delta, unmerge_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.merge import merge_record, merge_records
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_sdxl_unet

pytestmark = pytest.mark.behaviour

RECIPE = DeltaRecipe(prediction_type="diff_eps", num_time_windows=2, num_inference_steps=3, guidance_scale=1.0)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    save_delta(extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)), path, RECIPE, dtype=torch.float32)
    return path


def same(one: Any, other: Any) -> bool:
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


def reloaded(unet: UNet2DConditionModel, folder: Path, **settings: Any) -> UNet2DConditionModel:
    unet.save_pretrained(folder)
    return UNet2DConditionModel.from_pretrained(folder, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_not_merged_again(tmp_path: Path, delta: Path, dtype: torch.dtype) -> None:
    unet = tiny_sdxl_unet(0)
    live = merge_delta(unet, delta, 0.5, scales={"conv_out*": 2.0})
    again = reloaded(unet, tmp_path, dtype=dtype)
    record = merge_record(again)
    assert record is not None and record.reloaded and record.recipe == RECIPE
    assert (record.digest, record.scale, record.scales) == (live.digest, live.scale, live.scales)
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    assert merge_delta(again, delta, 0.5, scales={"conv_out*": 2.0}) == record
    for change in (lambda: merge_delta(again, delta), lambda: unmerge_delta(again)):
        with pytest.raises(ValueError, match=r"was loaded with delta\.safetensors .*load the base"):
            change()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    # Another delta goes in and out above it.
    style = {"conv_in.bias": torch.ones(16)}
    path = tmp_path / "style.safetensors"
    save_delta(style, path, partial=True)
    merge_delta(again, path)
    assert len(merge_records(again)) == 2 and not torch.equal(again.conv_in.bias, before["conv_in.bias"])
    unmerge_delta(again, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    assert [entry.source for entry in merge_records(reloaded(again, tmp_path / "b"))] == ["delta.safetensors"]


def test_the_configuration_names_no_directories_and_is_restored(tmp_path: Path, delta: Path) -> None:
    unet = tiny_sdxl_unet(0)
    unet.save_pretrained(tmp_path)  # which adds to the configuration itself
    before = dict(unet.config)
    merge_delta(unet, delta, base=tiny_sdxl_unet(0).state_dict())
    unet.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert str(delta.parent) not in text and json.loads(text)["_perflow_merges"]["deltas"][0]["scale"] == 1.0
    unmerge_delta(unet)
    assert dict(unet.config) == before and same(unet, tiny_sdxl_unet(0))


def test_a_model_that_only_has_the_configuration_is_not_taken_for_merged(delta: Path) -> None:
    unet = tiny_sdxl_unet(0)
    merge_delta(unet, delta)
    assert merge_records(UNet2DConditionModel.from_config(unet.config)) == ()


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e-1])
def test_training_further_does_not_make_the_model_forget(tmp_path: Path, delta: Path, size: float) -> None:
    unet, generator = tiny_sdxl_unet(0), torch.Generator().manual_seed(0)
    merge_delta(unet, delta)
    with torch.no_grad():
        for parameter in unet.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=size * parameter.abs().mean().item())
    again = reloaded(unet, tmp_path)
    assert [record.source for record in merge_records(again)] == ["delta.safetensors"]
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    merge_delta(again, delta)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("known", [True, False])
def test_a_reloaded_delta_comes_out_exactly_with_the_base(tmp_path: Path, delta: Path, known: bool) -> None:
    unet, base = tiny_sdxl_unet(0), tiny_sdxl_unet(0).state_dict()
    merge_delta(unet, delta, base=base)
    again = reloaded(unet, tmp_path)
    with pytest.raises(ValueError, match="exact=False"):
        unmerge_delta(again, delta)
    unmerge_delta(again, delta, base=base if known else None, exact=False)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, base[name], rtol=0, atol=0 if known else 1e-6)
    assert merge_records(again) == () and "_perflow_merges" not in again.config
