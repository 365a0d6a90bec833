"""The recipe that travels with a delta, and files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.files import read_recipe
from perflow_blocks.delta.recipe import DeltaRecipe

pytestmark = pytest.mark.behaviour

RECIPE = DeltaRecipe(
    prediction_type="ddim_eps",
    num_time_windows=4,
    window_boundaries=(1.0, 0.75, 0.5, 0.2, 0.0),
    num_inference_steps=6,
    guidance_scale=2.0,
    base_model="stabilityai/stable-diffusion-xl-base-1.0",
    scheduler_config={"beta_start": 0.00085, "beta_schedule": "scaled_linear"},
)


@pytest.mark.parametrize("recipe", [RECIPE, DeltaRecipe(), DeltaRecipe(guidance_scale=0.0, base_model="7")])
def test_the_recipe_travels_in_the_metadata(tmp_path: Path, recipe: DeltaRecipe) -> None:
    path = tmp_path / "delta.safetensors"
    save_delta({"w": torch.ones(1)}, path, recipe)
    assert read_recipe(path) == recipe
    with safe_open(path, framework="pt") as file:
        assert {k: v for k, v in file.metadata().items() if k != "format"} == recipe.to_metadata()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction_type", "epsilon"),
        ("num_time_windows", "four"),
        ("num_time_windows", "0"),
        ("num_time_windows", "10000000"),
        ("num_inference_steps", "2.5"),
        ("guidance_scale", "NaN"),
        ("guidance_scale", "-1"),
        ("guidance_scale", '"2"'),
        ("window_boundaries", "[0, 1]"),
        ("window_boundaries", "3"),
        ("window_boundaries", "[1, null]"),
        ("scheduler_config", "[1]"),
        ("scheduler_config", '{"beta_schedule": "wavy"}'),
        ("scheduler_config", '{"num_train_timesteps": 1000000000000}'),
        ("window_boundaries", "[" * 100_000),
        ("scheduler_config", '{"beta_start": "small"}'),
    ],
)
def test_metadata_that_makes_no_sense_is_refused_with_the_file_named(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "delta.safetensors"
    save_file({"w": torch.ones(1)}, path, metadata={f"perflow.{name}": value})
    with pytest.raises(ValueError, match="names unusable settings") as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_recipes_check_themselves() -> None:
    with pytest.raises(ValueError, match=r"num_time_windows=3 disagrees with the 2 windows"):
        DeltaRecipe(num_time_windows=3, window_boundaries=(1.0, 0.5, 0.0))
