"""What is known to be wrong before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from perflow_blocks.testing.tiny import BETAS, tiny_sdxl_unet
from perflow_blocks.training.config import ConfigError
from perflow_blocks.training.distillation import distill, require_possible
from perflow_blocks.training.student import lora_modules
from tests.training.conftest import save_teacher, tiny_config


def problems(folder: Path, teacher: Path | str, **overrides: Any) -> tuple[str, ...]:
    try:
        require_possible(tiny_config(folder, teacher, **overrides))
    except ConfigError as error:
        return error.problems
    return ()


@pytest.fixture
def teacher(teachers: dict[str, Path]) -> Path:
    return teachers["sdxl"]


def test_a_sound_request_has_no_problems(teacher: Path, tmp_path: Path) -> None:
    assert problems(tmp_path, teacher) == problems(tmp_path, "demo", data__resolution=64) == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_everything_is_told_at_once_and_nothing_is_loaded(teacher: Path, tmp_path: Path, loads: list[str]) -> None:
    (tmp_path / "run").write_text("")
    settings = {"model__student": "lora", "model__lora_targets": '["to_q", "to_nothing", "norm1"]'}
    settings |= {"data__kind": "folder", "data__path": str(tmp_path / "none"), "data__max_samples": "null"}
    settings |= {"optimizer__name": "adamw8bit", "output__tracker": "wandb"}
    with pytest.raises(ConfigError) as caught:
        distill(tiny_config(tmp_path, teacher, **settings))
    found = caught.value.problems
    assert len(found) == 5
    for part in ("bitsandbytes", "wandb", "no linear layer or convolution to_nothing, norm1", "none", "cannot write"):
        assert any(part in problem for problem in found), (part, found)
    assert loads == []


@pytest.mark.parametrize("name", ["./nowhere", "", "none.safetensors"])
def test_a_teacher_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    [problem] = problems(tmp_path, name if name.startswith("./") else tmp_path / name)
    assert "does not exist" in problem or "no file named" in problem or "from_single_file" in problem


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(**BETAS, prediction_type="sample"), "prediction_type='sample'"),
        (DDIMScheduler(**BETAS, rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
        (EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction"), None),
    ],
)
def test_noise_schedules_that_cannot_be_solved_are_refused(
    scheduler: DDIMScheduler, message: str | None, tmp_path: Path
) -> None:
    found = problems(tmp_path, save_teacher(tmp_path / "teacher", "sd", scheduler))
    assert (message is None and not found) or (len(found) == 1 and str(message) in found[0])


def test_a_folder_of_the_user_s_is_not_replaced_by_the_workflow(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "workflow").mkdir(parents=True)
    (tmp_path / "run" / "workflow" / "mine.txt").write_text("mine")
    [problem] = problems(tmp_path, teacher)
    assert "workflow" in problem and problems(tmp_path, teacher, output__workflow="false") == ()


def test_frozen_patterns_must_name_weights_and_leave_some(teacher: Path, tmp_path: Path) -> None:
    assert "no weight *nothing*" in problems(tmp_path, teacher, model__frozen='["*attn*", "*nothing*"]')[0]
    assert "leaves no weight" in problems(tmp_path, teacher, model__frozen='["*"]')[0]
    assert problems(tmp_path, teacher, model__frozen='["*attn*"]') == ()


def test_lora_targets_are_ends_of_names() -> None:
    unet = tiny_sdxl_unet()
    everything, modules = lora_modules(unet, None), dict(unet.named_modules())
    assert "down_blocks.0.resnets.0.conv1" in everything and "mid_block.attentions.0.proj_in" in everything
    assert not any(name.startswith(("time_embedding", "add_embedding", "conv_")) for name in everything)
    assert all(isinstance(modules[name], (torch.nn.Linear, torch.nn.Conv2d)) for name in everything)
    queries = lora_modules(unet, ["to_q", "conv_in"])
    assert queries[0] == "conv_in" and all(name.endswith(".to_q") for name in queries[1:]) and len(queries) > 2
    with pytest.raises(ValueError, match="to_x, q"):
        lora_modules(unet, ["to_q", "to_x", "q"])


def test_a_size_far_from_the_teachers_own_is_told(tmp_path: Path) -> None:
    """Prompts have no size of their own, and 1024 pixels, right for SDXL, are 16 times the demo's."""
    (tmp_path / "prompts.txt").write_text("a red star\n")
    prompts = {"data__kind": "prompts", "data__path": tmp_path / "prompts.txt", "teacher__starts": "trajectory"}
    prompts["data__max_samples"] = "null"
    [problem] = problems(tmp_path, "demo", **prompts, data__resolution=1024)
    assert "data.resolution=1024" in problem and problems(tmp_path, "demo", **prompts, data__resolution=128) == ()
