"""`perflow inspect`, and the summary of weights that it shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from perflow_blocks import extract_delta, merge_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.lora import delta_to_lora, save_lora
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_sdxl_components, tiny_sdxl_unet

Run = Callable[..., tuple[int, str, str]]
RECIPE = DeltaRecipe(prediction_type="diff_eps", num_time_windows=4, base_model="someone/base")


@pytest.fixture
def delta() -> dict[str, Tensor]:
    return extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))


def inspected(run: Run, *arguments: object) -> list[str]:
    status, out, err = run("inspect", *arguments)
    assert status == 0, err
    return out.splitlines()


def test_a_delta_is_told_with_its_recipe_and_layers(run: Run, delta: dict[str, Tensor], tmp_path: Path) -> None:
    delta["conv_out.bias"] *= 1000
    path = tmp_path / "delta.safetensors"
    save_delta(delta, path, RECIPE, torch.float32)
    tiny_sdxl_unet(0).save_pretrained(tmp_path / "base")
    lines = inspected(run, path, "--top", 2)
    numbers = sum(tensor.numel() for tensor in delta.values())
    assert lines[0] == f"{path}: delta"
    assert lines[1].startswith(f"{len(delta)} tensors, {numbers:,} numbers, float32, {4 * numbers / 1e6:,.1f} MB")
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in delta.values()))
    assert float(lines[2].removeprefix("norm: ")) == pytest.approx(norm, rel=1e-5)
    assert lines[3] == "recipe: prediction_type=diff_eps, num_time_windows=4, base_model=someone/base"
    assert lines[-3].endswith("root mean square")
    assert {"self-attention", "cross-attention", "feed-forward"} <= {line.split("  ")[0] for line in lines}
    assert lines[-2].startswith("conv_out.bias ") and len(lines[-2].split()) == 2
    relative = inspected(run, path, "--base", tmp_path / "base")
    name, value = relative[-5].split()
    assert relative[-6].endswith("norm over the base's")
    own = tiny_sdxl_unet(0).state_dict()
    assert name == "conv_out.bias"
    assert float(value) == pytest.approx(float(delta[name].norm() / own[name].norm()), rel=1e-2)


def test_json_holds_what_the_text_says(run: Run, delta: dict[str, Tensor], tmp_path: Path) -> None:
    delta["conv_out.bias"][0] = math.nan
    path = tmp_path / "delta.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in delta.items()}, path, RECIPE.to_metadata())
    (line,) = inspected(run, path, "--json", "--top", 1)
    found = json.loads(line, parse_constant=pytest.fail)
    numbers = sum(tensor.numel() for tensor in delta.values())
    assert found["what"] == "delta" and found["recipe"]["num_time_windows"] == 4
    assert (found["tensors"], found["numbers"], found["bytes"]) == (len(delta), numbers, 4 * numbers)
    assert (found["norm"], found["not_finite"]) == (None, ["conv_out.bias"])
    assert sum(kind["numbers"] for kind in found["kinds"].values()) == numbers and len(found["largest"]) == 1


def test_a_merged_folder_names_what_is_in_it(run: Run, delta: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_delta(delta, path, RECIPE)
    parts = tiny_sdxl_components()
    parts["unet"] = tiny_sdxl_unet(0)
    digest = merge_delta(parts["unet"], path, 0.5).digest
    StableDiffusionXLPipeline(**parts).save_pretrained(tmp_path / "pipeline")
    for folder, what in (
        (tmp_path / "pipeline" / "unet", "UNet folder, weights"),
        (tmp_path / "pipeline", "directory with a UNet, weights"),
    ):
        lines = inspected(run, folder)
        assert lines[0] == f"{folder}: {what}"
        (merged,) = (line for line in lines if line.startswith(("merged:", "recipe:")))
        assert merged.startswith(
            f"merged: mine.safetensors at scale 0.5, digest {digest[:12]}, recipe: prediction_type="
        )


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_a_lora_is_told_with_its_ranks(run: Run, delta: dict[str, Tensor], tmp_path: Path, layout: str) -> None:
    path = tmp_path / "lora.safetensors"
    converted = delta_to_lora(delta, energy=0.6, recipe=RECIPE)
    save_lora(converted, path, layout)  # type: ignore[arg-type]
    ranks = list(converted.report.ranks.values())
    lines = inspected(run, path)
    assert lines[0] == f"{path}: LoRA"
    assert f"layers: {len(ranks)}, rank {min(ranks)} to {max(ranks)}" in lines
    assert "recipe: prediction_type=diff_eps, num_time_windows=4, base_model=someone/base" in lines


def test_values_that_are_not_finite_are_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a.weight": torch.tensor([[1.0, math.nan]]), "b.weight": torch.tensor([[3.0, 4.0]])}, path)
    lines = inspected(run, path)
    assert lines[0] == f"{path}: delta or weights"
    assert "1 tensors are NOT FINITE, a.weight first" in lines
    assert ["b.weight", "3.54"] in [line.split() for line in lines]
