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
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_mask,
    tiny_picture,
    tiny_sdxl_components,
    tiny_sdxl_unet,
)
from tests.conftest import count_unet_calls, generator, make_pipeline
from tests.hub.conftest import save_ip_adapter

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


def test_text2image_takes_any_model(model: Path, cli: CLI) -> None:
    written = Image.open(cli("sdxl-text2image", "a red star", "--model", model, "--seed", 5))
    assert same(written, recipe("sdxl-text2image").draw(make_pipeline(), "a red star", seed=5))


def test_text2image_merges_a_delta(model: Path, cli: CLI, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    save_delta({name: torch.full_like(w, 0.01) for name, w in tiny_sdxl_unet().state_dict().items()}, path)
    written = Image.open(cli("sdxl-text2image", "a red star", "--model", model, "--delta", path))
    draw = recipe("sdxl-text2image").draw
    assert same(written, draw(make_pipeline(), "a red star", delta=path))
    assert not same(written, draw(make_pipeline(), "a red star"))


def test_image2image_starts_from_the_picture() -> None:
    redraw, pipe = recipe("sdxl-image2image").redraw, make_pipeline()
    first, second = (redraw(pipe, tiny_picture(k), "a red star", 0.3, num_inference_steps=4) for k in (1, 2))
    assert not same(first, second)


def test_image2image_moves_further_from_the_picture_with_strength() -> None:
    module = recipe("sdxl-image2image")
    pipe = module.load(None, "cpu")
    given = recipe("sdxl-text2image").draw(pipe, "a yellow circle on a navy background")
    redrawn = [
        module.redraw(pipe, given, "a red ring on a white background", strength) for strength in (0.2, 0.5, 0.9)
    ]
    distances = [np.abs(pixels(picture) - pixels(given)).mean() for picture in redrawn]
    assert distances[0] < 0.7 * distances[1] < 0.5 * distances[2]


def test_image2image_reads_a_picture(model: Path, cli: CLI, tmp_path: Path) -> None:
    given = saved(tiny_picture(1), tmp_path / "given.png")
    written = Image.open(cli("sdxl-image2image", "a red star", "--image", given, "--strength", 0.3, "--model", model))
    assert same(written, recipe("sdxl-image2image").redraw(make_pipeline(), tiny_picture(1), "a red star", 0.3))


def test_inpaint_changes_the_masked_part_alone() -> None:
    repaint, pipe = recipe("sdxl-inpaint").repaint, make_pipeline()
    image, mask = tiny_picture(1), tiny_mask()
    painted = repaint(pipe, image, mask, "a red star", num_inference_steps=4)
    hole = np.asarray(mask) > 127
    changed = np.abs(pixels(painted) - pixels(image)).max(-1) > 0
    assert not changed[~hole].any()
    assert changed[hole].mean() > 0.9
    assert not same(painted, repaint(pipe, image, mask, "a blue ring", num_inference_steps=4))


def test_inpaint_reads_picture_and_mask(model: Path, cli: CLI, tmp_path: Path) -> None:
    image, mask = saved(tiny_picture(1), tmp_path / "image.png"), saved(tiny_mask(), tmp_path / "mask.png")
    written = Image.open(cli("sdxl-inpaint", "a red star", "--image", image, "--mask", mask, "--model", model))
    assert same(written, recipe("sdxl-inpaint").repaint(make_pipeline(), tiny_picture(1), tiny_mask(), "a red star"))


def test_inpaint_without_a_mask_paints_a_disc() -> None:
    disc = np.asarray(recipe("sdxl-inpaint").disc((40, 20))) > 127
    assert disc.shape == (20, 40)
    assert disc[10, 20] and not disc[0].any() and not disc[:, 0].any() and not disc[3, 6]


@pytest.mark.parametrize("kind", ["controlnet", "union"])
def test_controlnet_follows_the_control_picture(kind: str) -> None:
    draw = recipe("sdxl-controlnet").draw
    union = {"control_mode": 0} if kind == "union" else {}
    pipe = make_pipeline(controlnet=tiny_controlnet_union() if union else tiny_controlnet())

    def picture(seed: int, scale: float) -> Image.Image:
        return draw(pipe, tiny_picture(seed), "a red star", scale, num_inference_steps=4, **union)

    assert not same(picture(1, 1.0), picture(2, 1.0))
    assert same(picture(1, 0.0), picture(2, 0.0))


def test_edges_are_white_on_black() -> None:
    picture = Image.new("RGB", (16, 16), "navy")
    picture.paste("yellow", (8, 0, 16, 16))
    found = np.asarray(recipe("sdxl-controlnet").edges(picture))
    assert found.shape == (16, 16, 3)
    assert found[:, 7:9].min() == 255
    assert found[:, :5].max() == found[:, 11:].max() == 0


def test_controlnet_of_a_repository(model: Path, cli: CLI, tmp_path: Path) -> None:
    tiny_controlnet().save_pretrained(tmp_path / "controlnet", variant="fp16")
    given = tiny_picture(1, size=(80, 49))
    options = [
        "--model",
        model,
        "--controlnet",
        tmp_path / "controlnet",
        "--device",
        "cpu",
        "--scale",
        1,
        "--size",
        40,
    ]
    written = Image.open(cli("sdxl-controlnet", saved(given, tmp_path / "given.png"), "a red star", *options))
    module, pipe = recipe("sdxl-controlnet"), make_pipeline(controlnet=tiny_controlnet())
    edges = module.edges(given.resize((40, 24), Image.Resampling.LANCZOS))
    assert same(written, module.draw(pipe, edges, "a red star", 1.0, width=40, height=24))


def test_ip_adapter_follows_the_given_picture() -> None:
    draw, pipe = recipe("sdxl-ip-adapter").draw, make_pipeline()
    load_tiny_ip_adapter(pipe)

    def picture(seed: int, scale: float) -> Image.Image:
        return draw(pipe, tiny_picture(seed), "a red star", scale, num_inference_steps=4)

    assert not same(picture(1, 1.0), picture(2, 1.0))
    assert same(picture(1, 0.0), picture(2, 0.0))


def test_ip_adapter_of_a_repository(model: Path, cli: CLI, tmp_path: Path) -> None:
    save_ip_adapter(tmp_path / "adapter")
    picture = saved(tiny_picture(1), tmp_path / "picture.png")
    options = ["--model", model, "--adapter", tmp_path / "adapter", "--device", "cpu"]
    with_it = Image.open(cli("sdxl-ip-adapter", picture, "a red star", *options, "--scale", 1)).copy()
    without = Image.open(cli("sdxl-ip-adapter", picture, "a red star", *options, "--scale", 0)).copy()
    assert same(without, recipe("sdxl-text2image").draw(make_pipeline(), "a red star"))
    assert not same(with_it, without)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_base_then_refiner_of_one_unet_is_the_undivided_run(share: float) -> None:
    pipe = make_pipeline()
    steps = {"num_inference_steps": 6}
    calls = count_unet_calls(pipe)
    divided = recipe("sdxl-base-refiner").draw(pipe, pipe, "a red star", share, **steps)
    assert len(calls) == 6
    whole = recipe("sdxl-text2image").draw(pipe, "a red star", **steps)
    assert np.abs(pixels(divided) - pixels(whole)).max() < 1.5 / 255
    assert pixels(whole).std() > 0.05


def test_base_and_refiner_each_do_their_share(caplog: pytest.LogCaptureFixture) -> None:
    base, refiner = make_pipeline(), make_pipeline(unet=tiny_sdxl_unet(seed=1))
    first, second = count_unet_calls(base), count_unet_calls(refiner)
    draw = recipe("sdxl-base-refiner").draw
    pictures = [draw(base, refiner, "a red star", share, num_inference_steps=4) for share in (0.25, 0.75)]
    assert (len(first), len(second)) == (1 + 3, 3 + 1)
    assert not same(*pictures)
    assert same(draw(base, refiner, "a red star", 0.8, num_inference_steps=4), pictures[1])
    assert "denoising_start=0.75 is used" in caplog.text


def test_the_refiner_of_another_repository(model: Path, cli: CLI, tmp_path: Path) -> None:
    tiny_sdxl_unet(seed=1).save_pretrained(tmp_path / "other" / "unet", variant="v0-fix")
    options = ["--model", model, "--refiner", tmp_path / "other", "--variant", "v0-fix"]
    written = Image.open(cli("sdxl-base-refiner", "a red star", *options))
    pipes = make_pipeline(), make_pipeline(unet=tiny_sdxl_unet(seed=1))
    assert same(written, recipe("sdxl-base-refiner").draw(*pipes, "a red star"))


def split() -> tuple[Any, Any]:
    """The recipe, and its stages with tiny components."""
    module = recipe("split_stages")
    stages = module.take_apart()
    components = tiny_sdxl_components()
    for stage in stages:
        stage.update_components(**{name: components[name] for name in stage.component_names if name in components})
        stage.set_progress_bar_config(disable=True)
    return module, stages


def test_each_stage_holds_only_what_it_needs() -> None:
    _, stages = split()
    loaded = [{name for name in stage.pretrained_component_names if getattr(stage, name)} for stage in stages]
    encoders = {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert loaded[0] == encoders
    assert "unet" in loaded[2] and not encoders & loaded[2]
    assert loaded[3] == {"vae"}


def test_one_encoding_serves_many_pictures() -> None:
    module, stages = split()
    calls: list[str] = []
    for name in ("text_encoder", "text_encoder_2"):
        getattr(stages.text, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    encoded = module.encode(stages, prompt="a red star", negative_prompt="a dot")
    once = list(calls)
    assert {"text_encoder", "text_encoder_2"} == set(once)
    whole = make_pipeline()
    for seed in (0, 1):
        for guidance in (1.0, 2.5):
            drawn = module.draw(stages, encoded, generator(seed), guidance, num_inference_steps=4)
            whole.guider.guidance_scale = guidance
            inputs = {"negative_prompt": "a dot", "num_inference_steps": 4}
            assert same(drawn, recipe("sdxl-text2image").draw(whole, "a red star", seed, **inputs))
    assert calls == once


def test_stages_give_the_latents_of_one_pipeline_bit_for_bit() -> None:
    module, stages = split()
    for picture in ({}, {"image": tiny_picture(1)}):
        source = generator(3)
        encoded = module.encode(stages, prompt="a red star", generator=source, **picture)
        strength = {"strength": 0.8} if picture else {}
        latents = stages.denoise(**encoded, **strength, generator=source, output="latents")
        whole = make_pipeline()(prompt="a red star", **picture, **strength, generator=generator(3), output="latents")
        assert torch.equal(latents, whole)


def test_the_sheet_has_a_row_for_each_scale_and_a_column_for_each_seed(cli: CLI) -> None:
    sheet = Image.open(cli("split_stages", "a red star", "--guidance-scales", 1, 2, "--num-images", 3))
    assert sheet.size == (3 * 64, 2 * 64)
    cells = [sheet.crop((x, y, x + 64, y + 64)) for y in (0, 64) for x in (0, 64, 128)]
    assert not any(same(*pair) for pair in combinations(cells, 2))
    demo = recipe("sdxl-text2image").load(None, "cpu")
    assert same(cells[2], recipe("sdxl-text2image").draw(demo, "a red star", seed=2))


def test_one_encoded_picture_serves_many() -> None:
    module, stages = split()
    vae = stages.picture.vae
    encodings: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda *_: encodings.append(1))
    encoded = module.encode(stages, tiny_picture(1), generator(0), prompt="a red star")
    pictures = [module.draw(stages, encoded, generator(0), strength=strength) for strength in (0.3, 0.8)]
    assert encodings == [1]
    assert not same(*pictures)


def test_the_block_of_the_custom_pipeline_keeps_its_contract() -> None:
    block = recipe("custom_block").MirrorStep()
    for width in (8, 7):
        latents = torch.randn(1, 4, 8, width, generator=generator())
        mirrored = check_block(block, inputs={"latents": latents}).latents
        assert torch.equal(mirrored, mirrored.flip(-1))
        assert torch.equal(mirrored[..., : width // 2], latents[..., : width // 2])


def test_the_custom_pipeline_draws_symmetric_pictures() -> None:
    module = recipe("custom_block")
    pipe = make_pipeline(module.mirrored_blocks())
    latents = pipe(prompt="a red star", generator=generator(), output="latents")
    assert torch.equal(latents, latents.flip(-1))
    never, once, always = (module.draw(pipe, "a red star", steps) for steps in (0, 1, None))
    assert same(never, recipe("sdxl-text2image").draw(make_pipeline(), "a red star"))
    assert not same(never, once) and not same(once, always)


def test_the_custom_block_is_in_every_loop() -> None:
    pipe = make_pipeline(recipe("custom_block").mirrored_blocks())
    latents = pipe(prompt="a red star", image=tiny_picture(1), strength=0.5, generator=generator(), output="latents")
    assert torch.equal(latents, latents.flip(-1))
    picture = {"image": tiny_picture(1), "mask_image": tiny_mask()}
    mirrored = pipe(prompt="a red star", **picture, generator=generator(), output="latents")
    plain = make_pipeline()(prompt="a red star", **picture, generator=generator(), output="latents")
    assert not torch.allclose(mirrored, plain, atol=1e-2)


def test_there_is_a_test_for_every_recipe() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.parent.rglob("test_*.py"))
    assert RECIPES
    for path in RECIPES:
        assert f'"{path.parent.name}"' in tests or f"/{path.parent.name}/" in tests, path
