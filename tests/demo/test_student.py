"""The last stages of the demo's training: base, student and what is published of them, at small size."""

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
from perflow_blocks.demo import publish, train
from perflow_blocks.demo.conditioning import CaptionEncoder
from perflow_blocks.demo.models import (
    GUIDANCE_SCALE,
    SCHEDULE,
    build_text_encoders,
    build_tokenizer,
    build_unet,
    build_vae,
)
from perflow_blocks.demo.student import SETTINGS
from perflow_blocks.demo.train_teacher import save_teacher
from perflow_blocks.evaluation import distilled
from perflow_blocks.training.config import load_config

DELTA = "perflow_delta.safetensors"
SMALL: dict[str, dict[str, Any]] = {
    "data": {"max_samples": 8},
    "teacher": {"steps_per_window": 1, "solve_every": 2, "buffer_size": 8},
    "optimizer": {"max_steps": 4, "batch_size": 2, "warmup_steps": 0, "ema_decay": 0.5},
    "output": {"checkpoint_every": 2, "validation_every": None, "workflow": False, "evaluation_prompts": 2},
}
"""What differs from the demo's own settings, whose windows, guidance and frozen weights stay."""


def write_settings(folder: Path, name: str = "small", **optimizer: float) -> Path:
    tree = load_config(SETTINGS).model_dump(mode="json")
    for section, values in SMALL.items():
        tree[section] |= values
    tree["optimizer"] |= optimizer
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    return path


def make_teacher(out: Path, seed: int = 0) -> None:
    """What the first stages leave in `out`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    build_vae().save_pretrained(out / "vae")
    save_teacher(build_unet((16, 32, 32), 1), CaptionEncoder(tokenizer, *build_text_encoders(tokenizer)), out)


@pytest.fixture(scope="module")
def small_evaluation() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_HELD_OUT", 4)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_evaluation: None) -> Path:
    """A directory with a run, its settings and its published `weights`; the student's training was broken off once."""
    folder = tmp_path_factory.mktemp("demo")
    make_teacher(folder / "run")
    settings, step, taken = write_settings(folder), EMAModel.step, []

    def interrupt_the_fourth(self: EMAModel, parameters: Any) -> None:
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        step(self, parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMAModel, "step", interrupt_the_fourth)
        patch.setattr(distilled, "evaluate_distilled", lambda given, _: f"| {given.optimizer.max_steps} updates |")
        with pytest.raises(KeyboardInterrupt):
            train.main(folder / "run", folder / "weights", settings=settings)
        assert not (folder / "weights").exists()  # what is published changes when all is there
        train.main(folder / "run", folder / "weights", settings=settings)
    assert len(taken) == 4 + 2  # it went on from the checkpoint after the second
    return folder


def unet(path: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(path, dtype=torch.float32)


def assert_same_delta(actual: Path, expected: Path) -> None:
    tensors, others = load_file(actual), load_file(expected)
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in others)
    assert read_recipe(actual) == read_recipe(expected)


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
    def refuse(*args: object) -> None:
        raise AssertionError("a finished student is trained again")

    monkeypatch.setattr("perflow_blocks.demo.student.distill", refuse)
    train.main(made / "run", made / "again", settings=made / "small.json")
    assert_same_delta(made / "again" / DELTA, made / "weights" / DELTA)
    first, second = (unet(made / name / "unet").state_dict() for name in ("weights", "again"))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_the_report_has_the_table_that_the_settings_ask_for(made: Path) -> None:
    assert "## Evaluation\n\n| 4 updates |" in (made / "run" / "distillation" / "report.md").read_text()


def test_other_settings_are_refused(made: Path) -> None:
    with pytest.raises(ValueError, match=r"distillation was distilled with other settings; remove it"):
        train.main(made / "run", made / "weights", settings=write_settings(made, "other", learning_rate=1e-5))


def test_the_command_publishes_the_delta_of_a_run_alone(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "weights", tmp_path / "weights", ignore=shutil.ignore_patterns(DELTA))
    app = typer.Typer()
    app.command()(publish.main)
    arguments = [str(made / "run" / "distillation"), "--weights", str(tmp_path / "weights")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert Path(done.output.strip()) == tmp_path / "weights" / DELTA
    assert_same_delta(tmp_path / "weights" / DELTA, made / "weights" / DELTA)


def test_a_student_of_another_base_is_refused_and_nothing_is_written(made: Path, tmp_path: Path) -> None:
    make_teacher(tmp_path, seed=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"does not lead from the base that is published.*and \d+ more.*distil"):
        publish.publish(made / "run" / "distillation", tmp_path)
    with pytest.raises(ValueError, match="holds no finished student"):
        publish.publish(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="no base in"):
        publish.publish(made / "run" / "distillation", tmp_path / "nothing")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_settings_bake_in_the_guidance_that_the_teacher_is_compared_with() -> None:
    config = load_config(SETTINGS)
    assert (config.teacher.cfg_mode, config.teacher.guidance_scale) == ("fixed", GUIDANCE_SCALE)
    assert config.model.teacher == "demo" and config.output.delta_dtype == "float16"
