"""The demo's training stages, each for a few steps at small size."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from perflow_blocks import merge_delta
from perflow_blocks.delta.files import read_recipe
from perflow_blocks.demo import train
from perflow_blocks.demo.images import Prompt, RenderedImages, all_captions, caption_numbers, render_images
from perflow_blocks.demo.models import GUIDANCE_SCALE, SCHEDULE, build_caption_encoder, build_unet, build_vae
from perflow_blocks.training.config import load_config

DELTA = "perflow_delta.safetensors"
SMALL_UNET = {"block_out_channels": (16, 32, 32), "layers_per_block": 1}
SMALL: dict[str, dict[str, Any]] = {
    "data": {"max_samples": 8},
    "teacher": {"steps_per_window": 1, "solve_every": 2, "buffer_size": 8},
    "optimizer": {"max_steps": 2, "batch_size": 2, "warmup_steps": 0, "ema_decay": 0.5},
    "output": {"checkpoint_every": 2, "validation_every": None, "workflow": False},
}
"""What differs from the demo's own settings, whose windows, guidance and frozen weights stay."""


@pytest.fixture(scope="module")
def images() -> RenderedImages:
    return render_images(40, seed=7, workers=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes whenever the training looks at the time."""
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=itertools.count().__next__))


def test_the_autoencoder_trains_and_scales_its_latents(images: RenderedImages, tmp_path: Path, clock: None) -> None:
    train.train_vae(images, tmp_path / "vae", 4, torch.device("cpu"), batch_size=4)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    latents = train.encode_images(vae, images)
    assert latents.shape == (40, 4, 16, 16)
    assert float(latents.std() * vae.config.scaling_factor) == pytest.approx(1.0, rel=1e-3)


def test_an_interrupted_teacher_goes_on_as_if_nothing_had_happened(
    images: RenderedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: None
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    latents = torch.randn(40, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    step, taken = EMAModel.step, []

    def teach(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        encoder, unet = build_caption_encoder(), build_unet(**SMALL_UNET)
        train.train_teacher(unet, encoder, latents, images, tmp_path / name, seconds=7, batch_size=2)
        return unet.state_dict()

    def interrupt(self: EMAModel, parameters: object) -> None:
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        step(self, parameters)

    unbroken = teach("unbroken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EMAModel, "step", interrupt)
        teach("broken")
    resumed = teach("broken")
    for name, weight in unbroken.items():
        torch.testing.assert_close(resumed[name], weight, msg=name)


def test_the_learning_rate_follows_the_time(clock: None) -> None:
    """The time of a checkpoint counts too, and a training whose time is over says so."""
    model, rates = torch.nn.Linear(1, 1), []
    step = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", note)
        train.fit(model, lambda update: (), lambda: model(torch.ones(1)).square().sum(), seconds=100, lr=0.1)
    assert len(rates) == 99 and rates[0] < rates[2] and rates == [*rates[:4], *sorted(rates[4:], reverse=True)]
    assert max(rates) == pytest.approx(0.1, rel=0.01) and rates[-1] < 1e-4
    with pytest.raises(ValueError, match="1 seconds are over already"):
        train.fit(model, lambda update: (), lambda: model.weight.sum(), seconds=1, lr=0.1)


def test_a_caption_number_is_its_place_among_all_captions(images: RenderedImages) -> None:
    numbers = torch.tensor([scene.numbers() for scene in images.scenes])
    named = torch.rand(len(images), 4, generator=torch.Generator().manual_seed(0)) < 0.5
    places = caption_numbers(numbers, named).tolist()
    for scene, keep, place in zip(images.scenes, named.tolist(), places, strict=True):
        names = ("color", "background", "size", "position")
        kept = {name: getattr(scene, name) for name, one in zip(names, keep, strict=True) if one}
        assert all_captions()[place] == Prompt(scene.shape, **kept).text


def make_base(directory: Path, seed: int = 0) -> None:
    """What the first stages leave."""
    torch.manual_seed(seed)
    train.save_base(build_vae(), build_unet(**SMALL_UNET), build_caption_encoder(), directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, its settings and its published `weights`."""
    folder = tmp_path_factory.mktemp("demo")
    make_base(folder / "run" / "base")
    tree = load_config(train.SETTINGS).model_dump(mode="json")
    for section, values in SMALL.items():
        tree[section] |= values
    (folder / "small.json").write_text(json.dumps(tree))
    train.main(folder / "run", folder / "weights", settings=folder / "small.json")
    return folder


def unet(path: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(path, dtype=torch.float32)


def test_the_published_base_and_delta_give_the_student(made: Path) -> None:
    base, student = (unet(made / path).state_dict() for path in ("weights/unet", "run/distillation/student"))
    merged = unet(made / "weights" / "unet")
    merge_delta(merged, made / "weights" / DELTA)
    delta = load_file(made / "weights" / DELTA)
    for name, weight in merged.state_dict().items():
        change = student[name] - base[name]
        if name not in delta:
            assert torch.equal(weight, student[name]) and not change.any(), name
            continue
        # Rounding to half precision: 11 bits, and a step of 2^-24 near zero; then float32's own at the sum.
        allowed = change.abs() * 2**-11 + 2**-25 + student[name].abs() * 2**-23
        assert ((weight - student[name]).abs() <= allowed).all(), name
    assert 0 < len(delta) < len(base)
    assert any((student[name] != base[name]).any() for name in delta)


def test_what_is_published_is_half_precision_with_the_recipe(made: Path) -> None:
    for path in (made / "weights").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}, path
    recipe = read_recipe(made / "weights" / DELTA)
    assert (recipe.prediction_type, recipe.num_time_windows, recipe.num_inference_steps) == ("ddim_eps", 4, 4)
    assert recipe.guidance_scale == 1.0  # the teacher's is baked in
    assert recipe.base_model == "perflow_blocks demo teacher" and recipe.scheduler_config == SCHEDULE
    frozen = ("transformer_blocks", "mid_block")
    assert not any(part in name for part in frozen for name in load_file(made / "weights" / DELTA))


def test_a_finished_run_is_published_again_without_training(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "distill", None)
    train.main(made / "run", made / "again", settings=made / "small.json")
    first, second = (load_file(made / name / DELTA) for name in ("weights", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_publishes_the_delta_of_a_run_and_no_other_base_takes_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "weights", tmp_path / "weights", ignore=shutil.ignore_patterns(DELTA))
    app = typer.Typer()
    app.command()(train.main)
    run = str(made / "run" / "distillation")
    done = CliRunner().invoke(app, ["--student", run, "--weights", str(tmp_path / "weights")])
    assert done.exit_code == 0, done.output
    assert load_file(tmp_path / "weights" / DELTA).keys() == load_file(made / "weights" / DELTA).keys()
    make_base(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"does not lead from the base that is published.*and \d+ more.*distil"):
        train.publish(made / "run" / "distillation", tmp_path / "other")
    assert not (tmp_path / "other" / DELTA).exists()


def test_the_settings_bake_in_the_guidance_that_the_teacher_is_compared_with() -> None:
    config = load_config(train.SETTINGS)
    assert (config.teacher.cfg_mode, config.teacher.guidance_scale) == ("fixed", GUIDANCE_SCALE)
    assert config.model.teacher == "demo" and config.output.delta_dtype == "float16"
