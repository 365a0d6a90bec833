"""A delta is merged into a pipeline as into its UNet, and may carry theta for the scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perflow_blocks import (
    PeRFlowModularPipeline,
    PeRFlowScheduler,
    PeRFlowSDXLAutoBlocks,
    extract_delta,
    merge_delta,
    rescale_delta,
    unmerge_delta,
)
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.files import open_weights, read_recipe
from perflow_blocks.delta.merge import merge_record
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing import tiny_sdxl_components
from perflow_blocks.testing.tiny import tiny_sdxl_unet
from tests.conftest import make_pipeline, run

pytestmark = pytest.mark.behaviour

THETA = ((0.1, -0.02), (0.0, 0.03), (-0.04, 0.0), (0.05, 1 / 3))


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    difference = extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))
    path = tmp_path / "delta.safetensors"
    save_delta(difference, path, DeltaRecipe(theta=THETA, solver_order=2, num_time_windows=4), torch.float32)
    return path


def test_a_file_holds_theta_as_a_tensor_and_no_weight_of_that_name(delta: Path) -> None:
    assert load_file(delta)["perflow.theta"].tolist() == [list(row) for row in THETA]
    with safe_open(str(delta), framework="pt") as file:
        assert "perflow.theta" not in file.metadata() and file.metadata()["perflow.solver_order"] == "2"
    assert read_recipe(delta).theta == read_recipe(load_file(delta)).theta == THETA
    assert "perflow.theta" not in open_weights(delta).shapes


def test_blocks_sample_with_the_theta_of_the_delta_that_is_merged(delta: Path) -> None:
    pipe, plain = make_pipeline(), make_pipeline(unet=tiny_sdxl_unet(1))
    plain.update_components(theta=[list(row) for row in THETA], solver_order=2)
    expected = run(plain, num_inference_steps=6)
    merge_delta(pipe, delta, base=tiny_sdxl_unet(0))
    torch.testing.assert_close(run(pipe, num_inference_steps=6), expected, rtol=1e-4, atol=1e-4)
    assert pipe.scheduler.config.theta == [list(row) for row in THETA]
    unmerge_delta(pipe)
    assert torch.equal(run(pipe, num_inference_steps=6), run(make_pipeline(), num_inference_steps=6))


def test_the_same_weights_with_another_recipe_change_what_is_sampled(delta: Path, tmp_path: Path) -> None:
    plain, pipe = tmp_path / "plain.safetensors", make_pipeline()
    save_delta(
        extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)), plain, DeltaRecipe(num_time_windows=4), torch.float32
    )
    drawn = [run(pipe, num_inference_steps=6, delta=path) for path in (plain, delta, plain)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.allclose(drawn[0], drawn[1], rtol=1e-2, atol=1e-2)


def test_the_mapping_of_a_file_keeps_theta(delta: Path, tmp_path: Path) -> None:
    save_delta(load_file(delta), tmp_path / "again.safetensors", DeltaRecipe(num_time_windows=4), torch.float32)
    assert read_recipe(tmp_path / "again.safetensors").theta == THETA


def test_a_scheduler_without_theta_comes_back_without_it(delta: Path, tmp_path: Path) -> None:
    pipe = make_pipeline()
    pipe.update_components(scheduler=PeRFlowScheduler.from_scheduler(pipe.scheduler), delta=str(delta))
    expected = run(pipe, num_inference_steps=6)
    pipe.save_pretrained(str(tmp_path / "saved"))
    again = PeRFlowModularPipeline.from_pretrained(str(tmp_path / "saved"))
    again.load_components(dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, num_inference_steps=6), expected)


def test_a_pipeline_without_a_unet_is_told(delta: Path) -> None:
    with pytest.raises(ValueError, match="the pipeline has no UNet; load"):
        merge_delta(PeRFlowSDXLAutoBlocks().init_pipeline(), delta)


def test_windows_of_the_configuration_leave_the_theta_of_others_out(delta: Path) -> None:
    pipe = make_pipeline()
    pipe.update_components(num_time_windows=2)
    run(pipe, delta=delta)
    assert pipe.scheduler.config.theta is None and pipe.scheduler.config.num_time_windows == 2


def test_a_merged_unet_that_was_saved_still_brings_theta(delta: Path, tmp_path: Path) -> None:
    unet = tiny_sdxl_unet(0)
    merge_delta(unet, delta)
    unet.save_pretrained(tmp_path / "unet")
    record = merge_record(type(unet).from_pretrained(tmp_path / "unet"))
    assert record is not None and record.recipe.theta == THETA


@pytest.mark.parametrize("theta", [[[0.0, 1.0, 2.0]] * 4, [[float("nan"), 0.0]] * 4, [[0.0, 0.0]] * 3, [0.1]])
def test_a_theta_that_cannot_be_used_is_refused_with_the_file(theta: Any, delta: Path) -> None:
    save_file({**load_file(delta), "perflow.theta": torch.tensor(theta)}, delta)
    with pytest.raises(ValueError, match=r"delta.safetensors names unusable settings: theta=.* 2 finite numbers"):
        merge_delta(tiny_sdxl_unet(0), delta)
    with pytest.raises(ValueError, match="2 finite numbers"):
        DeltaRecipe(theta=theta)


@pytest.mark.parametrize("kind", ["classic", "modular"])
def test_a_pipeline_stands_for_its_unet(kind: str, delta: Path) -> None:
    pipe = StableDiffusionXLPipeline(**tiny_sdxl_components()) if kind == "classic" else make_pipeline()
    unet = tiny_sdxl_unet(0)
    for one in (pipe, unet):
        record = merge_delta(one, delta, 0.5)
        rescale_delta(one, 1.0)
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in unet.state_dict().items())
    scheduler = PeRFlowScheduler.from_scheduler(pipe.scheduler, **record.recipe.scheduler_settings())
    assert json.loads(scheduler.to_json_string())["theta"] == [list(row) for row in THETA]
    assert scheduler.config.solver_order == 2
    unmerge_delta(pipe)
    base = tiny_sdxl_unet(0).state_dict()
    assert all(torch.allclose(pipe.unet.state_dict()[name], value, atol=1e-6) for name, value in base.items())
