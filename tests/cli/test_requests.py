"""What `perflow generate` draws from: images, LoRAs, merged UNets; and what its options change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from perflow_blocks import delta_to_lora, extract_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.lora import save_lora, save_residual
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import (
    tiny_controlnet,
    tiny_image,
    tiny_mask,
    tiny_sd_components,
    tiny_sd_controlnet,
    tiny_sdxl_components,
    tiny_sdxl_unet,
)

Run = Callable[..., tuple[int, str, str]]
RECIPE = DeltaRecipe(prediction_type="diff_eps", num_time_windows=2, num_inference_steps=4, guidance_scale=1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders sdxl, sd, and net-sdxl and net-sd, ControlNets; files delta, lora, rest, start.png and mask.png."""
    path = tmp_path_factory.mktemp("place")
    StableDiffusionXLPipeline(**tiny_sdxl_components()).save_pretrained(path / "sdxl")
    StableDiffusionPipeline(**tiny_sd_components()).save_pretrained(path / "sd")
    tiny_controlnet().save_pretrained(path / "net-sdxl")
    tiny_sd_controlnet().save_pretrained(path / "net-sd")
    base = tiny_sdxl_components()["unet"]
    student = tiny_sdxl_unet(7)
    student.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in base.state_dict().items()})
    save_delta(extract_delta(student, base), path / "delta.safetensors", RECIPE, torch.float32)
    converted = delta_to_lora(path / "delta.safetensors", rank=999, dtype=torch.float32)
    save_lora(converted, path / "lora.safetensors")
    save_residual(converted, path / "rest.safetensors")
    tiny_image(1).save(path / "start.png")
    tiny_mask().save(path / "mask.png")
    return path


@pytest.fixture
def draw(run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pixels and settings of the first image of a request, made in `place`."""
    monkeypatch.chdir(place)
    count = iter(range(100))

    def drawn(*arguments: object) -> tuple[np.ndarray, dict[str, Any]]:
        out = tmp_path / str(next(count))
        status, stdout, stderr = run("generate", "a star", "--steps", 4, "--json", "--out", out, *arguments)
        assert status == 0, stderr
        file = json.loads(stdout)["files"][0]
        with Image.open(file) as image:
            return np.asarray(image).astype(int), json.loads(image.info["perflow"])

    return drawn


def distance(one: np.ndarray, other: np.ndarray) -> int:
    """The largest, of 255. It may be 1 for weights that are the same and lie elsewhere in memory."""
    return int(np.abs(one - other).max())


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_images_masks_and_controls_change_the_image(draw: Any, family: str) -> None:
    def pixels(*options: object) -> np.ndarray:
        return draw("--model", family, *options)[0]

    plain, start = pixels("--size", 32), ("--image", "start.png")
    little, much = (pixels(*start, "--strength", strength) for strength in (0.3, 0.9))
    given = np.asarray(Image.open("start.png").convert("RGB")).astype(int)
    assert distance(little, plain) > 1 and np.abs(little - given).mean() < np.abs(much - given).mean()
    painted = pixels(*start, "--strength", 0.9, "--mask", "mask.png")
    assert distance(painted, much) > 1
    control = ("--control", "start.png", "--controlnet", f"net-{family}")
    assert distance(pixels("--size", 32, *control), plain) > 1
    assert distance(pixels(*start, "--strength", 0.9, *control), much) > 1


def test_settings_name_files_without_their_folders(draw: Any, place: Path) -> None:
    files = [place / name for name in ("start.png", "mask.png", "net-sdxl", "lora.safetensors", "rest.safetensors")]
    start = ("--model", place / "sdxl", "--image", files[0], "--strength", 0.9, "--mask", files[1])
    control = ("--control", files[0], "--controlnet", files[2])
    settings = draw(*start, *control, "--lora", f"{files[3]}:0.5", "--delta", files[4])[1]
    assert {name: settings[name] for name in ("model", "image", "mask", "control", "controlnet", "strength")} == {
        "model": "sdxl", "image": "start.png", "mask": "mask.png", "control": "start.png", "controlnet": "net-sdxl",
        "strength": 0.9,
    }  # fmt: skip
    assert (settings["loras"][0]["file"], settings["loras"][0]["scale"]) == ("lora.safetensors", 0.5)
    assert settings["delta"]["file"] == "rest.safetensors"
    assert str(place.parent) not in json.dumps(settings)


def test_what_the_command_made_is_taken(run: Run, draw: Any) -> None:
    """The merged UNet, and the LoRA with its residual, give the image of the delta."""
    wanted, settings = draw("--model", "sdxl", "--delta", "delta.safetensors")
    assert distance(wanted, draw("--model", "sdxl", "--guidance", 1)[0]) > 1
    assert run("merge", "sdxl", "delta.safetensors", "-o", "merged", "--force")[0] == 0
    merged, theirs = draw("--model", "merged")
    assert distance(merged, wanted) <= 1 and theirs["unet"] == "merged" and theirs["delta"] == settings["delta"]
    assert distance(draw("--model", "sdxl", "--unet", "merged")[0], wanted) <= 1
    both, _ = draw("--model", "sdxl", "--lora", "lora.safetensors", "--delta", "rest.safetensors")
    assert distance(both, wanted) <= 1
    alone, said = draw("--model", "sdxl", "--delta", "lora.safetensors")
    assert distance(alone, draw("--model", "sdxl", "--guidance", 1)[0]) > 1
    assert said["loras"][0]["file"] == "lora.safetensors"
    assert said["guidance"] == 1.0 and said["delta"] is None  # of the recipe in the LoRA's file
    half, _ = draw("--model", "sdxl", "--lora", "lora.safetensors:0.5", "--guidance", 1)
    assert distance(half, alone) > 1
    twice, _ = draw("--model", "sdxl", *["--lora", "lora.safetensors:0.5"] * 2, "--guidance", 1)
    assert distance(twice, alone) <= 1


def test_a_merged_unet_whose_pipeline_is_not_found_is_told_of(run: Run, draw: Any, tmp_path: Path) -> None:
    tiny_sdxl_unet().save_pretrained(tmp_path / "alone")
    status, _, stderr = run("generate", "a", "--model", tmp_path / "alone", "--out", tmp_path / "out")
    assert status == 2 and f"pass --unet {tmp_path / 'alone'}, and its pipeline as --model" in stderr


@pytest.mark.parametrize("options", [["--offload", "model"], ["--offload", "group"]])
def test_offloaded_models_give_the_same_image(draw: Any, options: list[str]) -> None:
    request = ("--model", "sdxl", "--delta", "delta.safetensors", "--image", "start.png")
    assert distance(draw(*request, *options)[0], draw(*request)[0]) <= 1


def test_compile_compiles_the_pipeline_in_its_type(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("perflow_blocks.blocks.recombine.compile_loops", compiled.append)
    _, settings = draw("--model", "sdxl", "--compile", "--dtype", "bf16")
    assert len(compiled) == 1 and settings["dtype"] == str(compiled[0].unet.dtype).removeprefix("torch.") == "bfloat16"


def test_seeds_of_several_prompts(run: Run, place: Path, tmp_path: Path) -> None:
    request = ("generate", "a", "b", "--num-images", 2, "--seed", 5, "--model", place / "sdxl", "--steps", 4, "--json")
    for options, seeds in (([], [5, 6, 7, 8]), (["--seed-for-all"], [5, 6, 5, 6])):
        assert json.loads(run(*request, "--out", tmp_path, *options)[1])["seeds"] == seeds


def test_the_parameters_are_those_that_other_programs_read(draw: Any, tmp_path: Path) -> None:
    """As A1111 reads them: the last line holds names and values, those with a comma in quotes, after the prompts."""
    _, settings = draw("--model", "sdxl", "--negative", "blue, red", "--seed", 7, "--guidance", 1.5)
    with Image.open(next(tmp_path.glob("0/0*.png"))) as image:
        *lines, last = image.info["parameters"].split("\n")
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert lines == ["a star", "Negative prompt: blue, red"]
    wanted = {"Steps": "4", "CFG scale": "1.5", "Seed": "7", "Size": "32x32", "Model": "sdxl", "Sampler": "PeRFlow"}
    assert wanted.items() <= found.items()
    assert settings["negative"] == "blue, red"


def test_json_and_quiet(run: Run, place: Path, tmp_path: Path) -> None:
    request = ("generate", "a", "b", "--model", place / "sdxl", "--steps", 4, "--out", tmp_path)
    _, stdout, stderr = run(*request, "--json")
    result = json.loads(stdout)
    assert "2 images" in stderr and [Path(file).parent for file in result["files"]] == [tmp_path] * 2
    assert result["seeds"] == [0, 1] and len(result["seconds"]) == 2 and result["failed"] == []
    assert [one["prompt"] for one in result["settings"]] == ["a", "b"]
    status, stdout, stderr = run(*request, "--quiet")
    assert (status, stderr) == (0, "") and len(stdout.splitlines()) == 3
