"""The demo's training stages, each for a few steps at small size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from perflow_blocks import merge_delta
from perflow_blocks.delta.files import read_recipe
from perflow_blocks.demo import train
from perflow_blocks.demo.images import RenderedImages, render_images
from perflow_blocks.demo.models import GUIDANCE_SCALE, SCHEDULE, build_caption_encoder, build_unet, build_vae
from perflow_blocks.training.config import load_config

DELTA = "perflow_delta.safetensors"
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


def test_the_autoencoder_trains_and_scales_its_latents(images: RenderedImages, tmp_path: Path) -> None:
    vae = train.train_vae(images, tmp_path / "vae", steps=3, batch_size=4)
    latents = train.encode_images(vae, images)
    assert latents.shape == (40, 4, 16, 16)
    assert float(latents.std() * vae.config.scaling_factor) == pytest.approx(1.0, rel=1e-3)


def test_an_interrupted_teacher_goes_on_as_if_nothing_had_happened(
    images: RenderedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    latents = torch.randn(40, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    step, taken = EMAModel.step, []

    def teach(name: str, steps: int = 4) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        encoder, unet = build_caption_encoder(), build_unet((16, 32, 32), 1)
        train.train_teacher(unet, encoder, latents, images, tmp_path / name, steps=steps, batch_size=2)
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
    with pytest.raises(ValueError, match="is of 4 steps, not 6"):
        teach("broken", steps=6)
    resumed = teach("broken")
    for name, weight in unbroken.items():
        torch.testing.assert_close(resumed[name], weight, msg=name)


@pytest.mark.parametrize("steps", [3, 25])  # 25: a warm-up of 4 % is one step
def test_a_few_steps_fit(steps: int) -> None:
    model = torch.nn.Linear(1, 1)
    train.fit(model, lambda step: model(torch.ones(1)).square().sum(), steps=steps, lr=0.1, warmup=0.04)
    with pytest.raises(ValueError, match="steps=2 is below 3"):
        train.fit(model, lambda step: model.weight.sum(), steps=2, lr=0.1)


def make_base(directory: Path, seed: int = 0) -> None:
    """What the first stages leave."""
    torch.manual_seed(seed)
    train.save_base(build_vae(), build_unet((16, 32, 32), 1), build_caption_encoder(), directory)


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
