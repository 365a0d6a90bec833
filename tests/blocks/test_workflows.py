"""Every recipe under workflows/, at tiny size: its function on tiny components, its command line on small weights."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageChops

from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing import (
    check_block,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_image,
    tiny_mask,
    tiny_sdxl_components,
    tiny_sdxl_unet,
)
from tests.checkpoints import save_ip_adapter
from tests.conftest import count_unet_calls, generator, make_pipeline

pytestmark = pytest.mark.behaviour

WORKFLOWS = Path(__file__).parent.parent.parent / "workflows"
RECIPES = sorted(WORKFLOWS.glob("*/recipe.py"))
ON_THE_DEMO_MODEL = [
    "demo-text2image",
    "sdxl-text2image",
    "sdxl-image2image",
    "sdxl-inpaint",
    "sdxl-base-refiner",
    "split_stages",
    "custom_block",
]
CLI = Callable[..., Path]


def recipe(name: str) -> SimpleNamespace:
    """What the recipe defines."""
    return SimpleNamespace(**runpy.run_path(str(WORKFLOWS / name / "recipe.py")))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CLI:
    """Runs a recipe as its command line does; returns the picture that it says it wrote."""

    def run_recipe(name: str, *arguments: object) -> Path:
        out = tmp_path / "new" / f"{name}.png"
        monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments), "--out", str(out)])
        runpy.run_path(str(WORKFLOWS / name / "recipe.py"), run_name="__main__")
        assert capsys.readouterr().out == f"{out}\n"
        return out

    return run_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain SDXL directory, as any fine-tune is published."""
    path = tmp_path_factory.mktemp("model")
    StableDiffusionXLPipeline(**tiny_sdxl_components()).save_pretrained(path)
    return path


def saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and ImageChops.difference(first, second).getbbox() is None


def pixels(image: Image.Image) -> np.ndarray:
    """Values (height, width, 3) from 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=float) / 255


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_says_how_to_run_it(path: Path) -> None:
    defined = runpy.run_path(str(path))
    assert f"python workflows/{path.parent.name}/recipe.py" in defined["__doc__"]
    assert defined["main"].__annotations__["return"] == "Path"


@pytest.mark.parametrize("name", ON_THE_DEMO_MODEL)
def test_the_demo_model_runs_by_default(name: str, cli: CLI) -> None:
    with Image.open(cli(name)) as picture:
        columns = 4 if name == "split_stages" else 1
        assert picture.size == (64 * columns, 64)
        assert pixels(picture).std() > 0.1


def test_text2image_draws_what_the_prompt_says(cli: CLI) -> None:
    picture = pixels(Image.open(cli("sdxl-text2image", "a red star on a white background", "--seed", 3)))
    shape = picture[picture.sum(-1) < 2.4].mean(0)  # the background is white
    assert shape[0] > 1.5 * shape[1] and shape[0] > 1.5 * shape[2]


def test_text2image_merges_a_delta(model: Path, cli: CLI, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    save_delta({name: torch.full_like(w, 0.01) for name, w in tiny_sdxl_unet().state_dict().items()}, path)
    written = Image.open(cli("sdxl-text2image", "a red star", "--model", model, "--delta", path))
    draw = recipe("sdxl-text2image").draw
    assert same(written, draw(make_pipeline(), "a red star", delta=path))
    assert not same(written, draw(make_pipeline(), "a red star"))


def test_image2image_moves_further_from_the_picture_with_strength() -> None:
    module = recipe("sdxl-image2image")
    pipe = module.load(None, "cpu")
    given = recipe("sdxl-text2image").draw(pipe, "a yellow circle on a navy background")
    redrawn = [
        module.redraw(pipe, given, "a red ring on a white background", strength) for strength in (0.2, 0.5, 0.9)
    ]
    distances = [np.abs(pixels(picture) - pixels(given)).mean() for picture in redrawn]
    assert distances[0] < 0.7 * distances[1] < 0.5 * distances[2]


def test_inpaint_changes_the_masked_part_alone() -> None:
    repaint, pipe = recipe("sdxl-inpaint").repaint, make_pipeline()
    image, mask = tiny_image(1), tiny_mask()
    painted = repaint(pipe, image, mask, "a red star", num_inference_steps=4)
    hole = np.asarray(mask) > 127
    changed = np.abs(pixels(painted) - pixels(image)).max(-1) > 0
    assert not changed[~hole].any()
    assert changed[hole].mean() > 0.9
    assert not same(painted, repaint(pipe, image, mask, "a blue ring", num_inference_steps=4))


def test_inpaint_reads_picture_and_mask(model: Path, cli: CLI, tmp_path: Path) -> None:
    image, mask = saved(tiny_image(1), tmp_path / "image.png"), saved(tiny_mask(), tmp_path / "mask.png")
    written = Image.open(cli("sdxl-inpaint", "a red star", "--image", image, "--mask", mask, "--model", model))
    assert same(written, recipe("sdxl-inpaint").repaint(make_pipeline(), tiny_image(1), tiny_mask(), "a red star"))


@pytest.mark.parametrize("kind", ["controlnet", "union"])
def test_controlnet_follows_the_control_picture(kind: str) -> None:
    draw = recipe("sdxl-controlnet").draw
    union = {"control_mode": 0} if kind == "union" else {}
    pipe = make_pipeline(controlnet=tiny_controlnet_union() if union else tiny_controlnet())

    def picture(seed: int, scale: float) -> Image.Image:
        return draw(pipe, tiny_image(seed), "a red star", scale, num_inference_steps=4, **union)

    assert not same(picture(1, 1.0), picture(2, 1.0))
    assert same(picture(1, 0.0), picture(2, 0.0))


def test_controlnet_of_a_repository(model: Path, cli: CLI, tmp_path: Path) -> None:
    tiny_controlnet().save_pretrained(tmp_path / "controlnet", variant="fp16")
    given = tiny_image(1, size=(80, 49))
    options = ["--model", model, "--controlnet", tmp_path / "controlnet", "--device", "cpu", "--scale", 1]
    options += ["--size", 40]
    written = Image.open(cli("sdxl-controlnet", saved(given, tmp_path / "given.png"), "a red star", *options))
    module, pipe = recipe("sdxl-controlnet"), make_pipeline(controlnet=tiny_controlnet())
    edges = module.edges(given.resize((40, 24), Image.Resampling.LANCZOS))
    assert same(written, module.draw(pipe, edges, "a red star", 1.0, width=40, height=24))


def test_ip_adapter_of_a_repository(model: Path, cli: CLI, tmp_path: Path) -> None:
    save_ip_adapter(tmp_path / "adapter")
    picture = saved(tiny_image(1), tmp_path / "picture.png")
    options = ["--model", model, "--adapter", tmp_path / "adapter", "--device", "cpu"]
    with_it = Image.open(cli("sdxl-ip-adapter", picture, "a red star", *options, "--scale", 1)).copy()
    without = Image.open(cli("sdxl-ip-adapter", picture, "a red star", *options, "--scale", 0)).copy()
    assert same(without, recipe("sdxl-text2image").draw(make_pipeline(), "a red star"))
    assert not same(with_it, without)


def test_base_then_refiner_of_one_unet_is_the_undivided_run() -> None:
    pipe = make_pipeline()
    steps = {"num_inference_steps": 6}
    calls = count_unet_calls(pipe)
    divided = recipe("sdxl-base-refiner").draw(pipe, pipe, "a red star", 0.5, **steps)
    assert len(calls) == 6
    whole = recipe("sdxl-text2image").draw(pipe, "a red star", **steps)
    assert np.abs(pixels(divided) - pixels(whole)).max() < 1.5 / 255
    assert pixels(whole).std() > 0.05


def split() -> tuple[Any, Any]:
    """The recipe, and its stages with tiny components."""
    module = recipe("split_stages")
    stages = module.take_apart()
    components = tiny_sdxl_components()
    for stage in stages:
        stage.update_components(**{name: components[name] for name in stage.component_names if name in components})
        stage.set_progress_bar_config(disable=True)
    return module, stages


def test_one_encoding_serves_many_pictures() -> None:
    module, stages = split()
    calls: list[str] = []
    for name in ("text_encoder", "text_encoder_2"):
        getattr(stages.text, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    encoded = module.encode(stages, prompt="a red star", negative_prompt="a dot")
    once = list(calls)
    assert {"text_encoder", "text_encoder_2"} == set(once)
    whole = make_pipeline()
    for seed, guidance in ((0, 1.0), (1, 2.5)):
        drawn = module.draw(stages, encoded, generator(seed), guidance, num_inference_steps=4)
        whole.guider.guidance_scale = guidance
        inputs = {"negative_prompt": "a dot", "num_inference_steps": 4}
        assert same(drawn, recipe("sdxl-text2image").draw(whole, "a red star", seed, **inputs))
    assert calls == once


def test_the_sheet_has_a_row_for_each_scale_and_a_column_for_each_seed(cli: CLI) -> None:
    sheet = Image.open(cli("split_stages", "a red star", "--guidance-scales", 1, 2, 3, "--num-images", 2))
    assert sheet.size == (2 * 64, 3 * 64)
    cells = [sheet.crop((x, y, x + 64, y + 64)) for y in (0, 64, 128) for x in (0, 64)]
    assert not any(same(*pair) for pair in combinations(cells, 2))


def test_the_block_of_the_custom_pipeline_keeps_its_contract() -> None:
    block = recipe("custom_block").MirrorStep()
    latents = torch.randn(1, 4, 8, 7, generator=generator())
    mirrored = check_block(block, inputs={"latents": latents}).latents
    assert torch.equal(mirrored, mirrored.flip(-1)) and torch.equal(mirrored[..., :3], latents[..., :3])


def test_the_custom_pipeline_draws_symmetric_pictures() -> None:
    module = recipe("custom_block")
    pipe = make_pipeline(module.mirrored_blocks())
    latents = pipe(prompt="a red star", generator=generator(), output="latents")
    assert torch.equal(latents, latents.flip(-1))
    never, once, always = (module.draw(pipe, "a red star", steps) for steps in (0, 1, None))
    assert same(never, recipe("sdxl-text2image").draw(make_pipeline(), "a red star"))
    assert not same(never, once) and not same(once, always)


def test_there_is_a_test_for_every_recipe() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.parent.rglob("test_*.py"))
    assert RECIPES
    for path in RECIPES:
        assert f'"{path.parent.name}"' in tests or f"/{path.parent.name}/" in tests, path
