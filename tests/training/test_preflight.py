"""What is known to be wrong before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file

from perflow_blocks.testing.tiny import BETAS, tiny_inpainting_unet, tiny_sd_unet, tiny_sdxl_unet
from perflow_blocks.training.config import ConfigError, load_config
from perflow_blocks.training.loop import train
from perflow_blocks.training.preflight import require_possible
from perflow_blocks.training.student import lora_modules
from tests.training.conftest import save_teacher, tiny_config, write_config


@pytest.fixture
def teacher(teachers: dict[str, Path]) -> Path:
    return teachers["sdxl"]


def found(path: Path, **overrides: object) -> tuple[str, ...]:
    texts = {key.replace("__", ".", 1): str(value) for key, value in overrides.items()}
    with pytest.raises(ConfigError) as caught:
        require_possible(load_config(path, texts))
    return caught.value.problems


def test_a_sound_request_has_no_problems(teacher: Path, tmp_path: Path) -> None:
    require_possible(load_config(write_config(tmp_path, teacher)))
    require_possible(load_config(write_config(tmp_path, "demo"), {"data.resolution": "64"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_everything_is_told_at_once_and_nothing_is_loaded(teacher: Path, tmp_path: Path, loads: list[str]) -> None:
    scheduler = json.loads((teacher / "scheduler" / "scheduler_config.json").read_text())
    broken = tmp_path / "broken"
    for folder in ("unet", "vae"):
        (broken / folder).mkdir(parents=True)
        (broken / folder / "config.json").write_text((teacher / folder / "config.json").read_text())
    (broken / "scheduler").mkdir()
    (broken / "scheduler" / "scheduler_config.json").write_text(json.dumps({**scheduler, "prediction_type": "sample"}))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    problems = found(
        write_config(tmp_path, broken),
        model__student="lora",
        model__lora_targets='["to_q", "to_nothing", "norm1"]',
        data__kind="folder",
        data__path=pictures,
        optimizer__name="adamw8bit",
        output__tracker="wandb",
    )
    for part in (
        "prediction_type='sample' of DDIMScheduler",
        "no linear layer or convolution to_nothing, norm1",
        str(pictures),
        "needs bitsandbytes",
        "output.tracker='wandb' is not installed",
    ):
        assert any(part in problem for problem in problems), (part, problems)
    assert loads == [] and not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    for teacher, message in (
        ("./nowhere", "does not exist"),
        (str(tmp_path), "cannot read the unet's configuration"),
        (str(tmp_path / "none.safetensors"), "does not exist"),
    ):
        assert any(message in problem for problem in found(write_config(tmp_path, teacher)))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(**BETAS, prediction_type="sample"), "prediction_type='sample'"),
        (DDIMScheduler(**BETAS, rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    ],
)
def test_unusable_noise_schedules_are_refused(scheduler: DDIMScheduler, message: str, tmp_path: Path) -> None:
    path = save_teacher(tmp_path / "teacher", "sd", scheduler)
    assert any(message in problem for problem in found(write_config(tmp_path, path)))


def test_any_scheduler_with_betas_will_do(tmp_path: Path) -> None:
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction")
    path = save_teacher(tmp_path / "teacher", "sd", scheduler)
    require_possible(load_config(write_config(tmp_path, path)))


def test_an_inpainting_teacher_is_refused(tmp_path: Path) -> None:
    path = save_teacher(tmp_path / "teacher", "sdxl")
    tiny_inpainting_unet().save_pretrained(path / "unet")
    assert any("takes 9 channels" in problem for problem in found(write_config(tmp_path, path)))


def test_a_student_of_another_architecture_is_refused(teacher: Path, tmp_path: Path) -> None:
    tiny_sd_unet().save_pretrained(tmp_path / "other")
    tiny_sdxl_unet(1).save_pretrained(tmp_path / "same")
    path = write_config(tmp_path, teacher)
    assert any("another architecture" in p for p in found(path, model__init_student=tmp_path / "other"))
    assert any("model.init_student=" in p for p in found(path, model__init_student=tmp_path / "none"))
    [problem] = found(path, model__init_student=tmp_path / "none")
    assert problem.endswith("none: there is no such directory; name that of a UNet, student/ of an earlier run say.")
    require_possible(load_config(path, {"model.init_student": str(tmp_path / "same")}))


def test_what_a_table_of_quality_needs_is_told(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"output__evaluation_prompts": 2, "data__resolution": 64}
    overrides = {key.replace("__", "."): str(value) for key, value in settings.items()}
    require_possible(load_config(write_config(tmp_path, teachers["sdxl"]), overrides))
    [problem] = found(write_config(tmp_path, teachers["sd"]), **settings)
    assert problem == "output.evaluation_prompts is for teachers of SDXL's family; leave it out."
    monkeypatch.setattr("perflow_blocks.training.preflight.find_spec", lambda name: None)
    [problem] = found(write_config(tmp_path, teachers["sdxl"]), **settings)
    assert "needs torchmetrics, which is not installed" in problem


def test_a_file_in_the_output_s_way_is_told(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert any("output.directory: cannot write" in problem for problem in found(write_config(tmp_path, teacher)))


def test_what_is_in_the_way_of_an_output_is_told(teacher: Path, tmp_path: Path) -> None:
    path, run = write_config(tmp_path, teacher), tmp_path / "run"
    (run / "delta.safetensors").mkdir(parents=True)
    for name in ("student", "workflow"):
        (run / name).write_text("mine")
    problems = found(path)
    assert len(problems) == 3
    assert any(f"{run / 'student'} is a file where a directory is written; move it" in p for p in problems)
    assert any(f"{run / 'delta.safetensors'} is a directory where a file is written" in p for p in problems)
    assert any(f"output.workflow: {run / 'workflow'} exists and is no workflow repository" in p for p in problems)
    assert len(found(path, output__workflow="false")) == 2
    for name in ("student", "workflow"):
        (run / name).unlink()
    (run / "delta.safetensors").rmdir()
    (run / "workflow").mkdir()
    require_possible(load_config(path))
    (run / "workflow" / "mine.txt").write_text("mine")
    assert any("exists and is no workflow repository" in p for p in found(path))
    require_possible(load_config(path, {"output.workflow": "false"}))


def test_train_checks_by_itself(tmp_path: Path, loads: list[str]) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        train(tiny_config(tmp_path, "./nowhere"))
    assert loads == []


def test_frozen_patterns_must_name_weights_and_leave_some(teacher: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, teacher)
    assert any("no weight *nothing*, x" in p for p in found(path, model__frozen='["*nothing*", "conv_in.*", "x"]'))
    assert any("leaves no weight to train" in p for p in found(path, model__frozen='["*"]'))
    assert any("for full weights" in p for p in found(path, model__frozen='["*"]', model__student="lora"))
    require_possible(load_config(path, {"model.frozen": '["*attn*"]'}))


def test_lora_targets_are_ends_of_names() -> None:
    unet = tiny_sdxl_unet()
    modules = dict(unet.named_modules())
    everything = lora_modules(unet, None)
    assert "down_blocks.0.resnets.0.conv1" in everything and "mid_block.attentions.0.proj_in" in everything
    assert not any(name.startswith(("time_embedding", "add_embedding", "conv_")) for name in everything)
    assert all(isinstance(modules[name], (torch.nn.Linear, torch.nn.Conv2d)) for name in everything)
    queries = lora_modules(unet, ["to_q", "conv_in"])
    assert queries[0] == "conv_in" and all(name.endswith(".to_q") for name in queries[1:]) and len(queries) > 2
    with pytest.raises(ValueError, match="to_x, q"):
        lora_modules(unet, ["to_q", "to_x", "q"])


def test_a_single_file_is_looked_at(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    path = write_config(tmp_path, tmp_path / "model.safetensors")
    assert any("cannot read the unet's" in p for p in found(path, model__config=tmp_path / "nothing"))


def test_a_size_far_from_the_teachers_own_is_told(tmp_path: Path) -> None:
    """Prompts have no size of their own, and 1024 pixels, right for SDXL, are 16 times the demo's."""
    (tmp_path / "prompts.txt").write_text("a red star\n")
    path = write_config(tmp_path, "demo")
    prompts = {"data.kind": "prompts", "data.path": str(tmp_path / "prompts.txt"), "teacher.starts": "trajectory"}
    with pytest.raises(ConfigError, match=r"data.resolution=1024 is more than 4 times the teacher's own 64 pixels"):
        require_possible(load_config(path, {**prompts, "data.resolution": "1024"}))
    require_possible(load_config(path, {**prompts, "data.resolution": "128"}))
