"""Validation shows what users will get, and leaves the training as it would be without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from perflow_blocks import PeRFlowScheduler
from perflow_blocks.training.drawing import Painter, resulting_student
from perflow_blocks.training.loop import Observer, train
from perflow_blocks.training.result import TrainingResult, make_scheduler, recipe_of
from perflow_blocks.training.session import Session, open_session
from perflow_blocks.training.validation import Validation, fixed_inputs, sheet_path, student_steps
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

PROMPTS = ["a red star", "a ring"]
SETTINGS: dict[str, Any] = {
    "output__validation_every": 3,
    "output__validation_prompts": json.dumps(PROMPTS),
    "output__validation_teacher_steps": 5,
    "optimizer__ema_decay": 0.5,
}


class Keeps(Observer):
    """Draws with the student at the end, as validation does."""

    def __init__(self) -> None:
        self.picture: Tensor | None = None
        self.noise: Tensor | None = None

    def updated(self, session: Session, step: int) -> None:
        if step == session.config.optimizer.max_steps:
            inputs = fixed_inputs(session)
            painter = Painter(session, make_scheduler(session), recipe_of(session).guidance_scale or 1.0)
            with resulting_student(session) as student:
                self.picture, self.noise = painter.student(student, inputs, 4), inputs.noise


def readings(result: TrainingResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.directory / "validation.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("family", "student"), [("sdxl", "full"), ("sd", "lora")])
def test_it_shows_the_student_and_changes_nothing(
    family: str, student: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    kind = {"model__student": student, "model__lora_rank": 2}
    seen = train(tiny_config(tmp_path, teachers[family], "seen", **SETTINGS, **kind), [Validation()])
    unseen = train(tiny_config(tmp_path, teachers[family], "unseen", optimizer__ema_decay=0.5, **kind))
    one, other = load_file(seen.delta), load_file(unseen.delta)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    found = readings(seen)
    assert [line["step"] for line in found] == [0, 3, 6]
    assert all(len(line[name]) == 4 for line in found for name in ("student", "teacher", "endpoint_error"))
    assert found[0]["teacher"] == found[2]["teacher"] and found[0]["student"] != found[2]["student"]
    assert all(value >= 0 for line in found for value in line["student"] + line["endpoint_error"])
    sheets = [sheet_path(seen.directory, step) for step in (0, 3, 6)]
    assert sorted((seen.directory / "validation").iterdir()) == sheets
    with Image.open(sheets[0]) as first, Image.open(sheets[2]) as last:
        assert first.size == last.size and first.width > 4 * 192  # teacher and three numbers of steps
        assert first.tobytes() != last.tobytes()
    assert not (unseen.directory / "validation").exists()


def test_the_pictures_are_those_of_the_saved_student(teachers: dict[str, Path], tmp_path: Path) -> None:
    keeps = Keeps()
    result = train(tiny_config(tmp_path, teachers["sd"], **SETTINGS, teacher__cfg_mode="sync"), [keeps])
    assert result.student is not None and keeps.noise is not None and keeps.picture is not None
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        teachers["sd"],
        unet=UNet2DConditionModel.from_pretrained(result.student),
        scheduler=PeRFlowScheduler.from_pretrained(result.scheduler),
    )
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(PROMPTS, latents=keeps.noise, num_inference_steps=4, guidance_scale=4.5, output_type="pt").images
    torch.testing.assert_close(drawn, keeps.picture, rtol=0, atol=1e-4)
    plain = pipe(PROMPTS, latents=keeps.noise, num_inference_steps=4, guidance_scale=1.0, output_type="pt").images
    assert (plain - keeps.picture).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("student", ["full", "lora"])
@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_it_draws_in_every_mixture_of_types(
    family: str, upcast: bool, student: str, precision: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(teachers[family], teacher)
    vae = teacher / "vae" / "config.json"
    vae.write_text(json.dumps({**json.loads(vae.read_text()), "force_upcast": upcast}))
    plain = open_session(tiny_config(tmp_path, teacher, **SETTINGS))
    inputs = fixed_inputs(plain)
    steps, scheduler = 2 * plain.geometry.num_windows, make_scheduler(plain)
    wanted = Painter(plain, scheduler, 2.0).student(plain.accelerator.unwrap_model(plain.student), inputs, steps)
    AcceleratorState._reset_state(reset_partial_state=True)
    kind: dict[str, Any] = {"model__student": student, "model__lora_rank": 2, "optimizer__mixed_precision": precision}
    session = open_session(tiny_config(tmp_path, teacher, teacher__dtype="bfloat16", **SETTINGS, **kind))
    painter, inputs = Painter(session, scheduler, 2.0), fixed_inputs(session)
    with resulting_student(session) as bare:
        drawn = painter.student(bare, inputs, steps)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=0.1)
    assert painter.teacher(inputs, 2, 1.0).shape == drawn.shape


def test_sdxl_pictures_have_the_guidance_of_the_recipe(teachers: dict[str, Path], tmp_path: Path) -> None:
    session = open_session(tiny_config(tmp_path, teachers["sdxl"], **SETTINGS))
    inputs, unet = fixed_inputs(session), session.accelerator.unwrap_model(session.student)
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(
        teachers["sdxl"], unet=unet, scheduler=make_scheduler(session), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    for scale in (1.0, 3.0):
        drawn = Painter(session, make_scheduler(session), scale).student(unet, inputs, 5)
        size = inputs.noise.shape[-1] * session.source.vae_factor
        wanted = pipe(
            PROMPTS,
            latents=inputs.noise,
            height=size,
            width=size,
            num_inference_steps=5,
            guidance_scale=scale,
            output_type="pt",
        ).images
        torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_the_teacher_s_pictures_are_those_of_its_pipeline(
    family: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    session = open_session(tiny_config(tmp_path, teachers[family], **SETTINGS))
    inputs = fixed_inputs(session)
    drawn = Painter(session, make_scheduler(session), 1.0).teacher(inputs, 10, 3.0)
    kind: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipe = kind.from_pretrained(teachers[family])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    size = inputs.noise.shape[-1] * session.source.vae_factor
    arguments = {"num_inference_steps": 10, "guidance_scale": 3.0, "height": size, "width": size}
    wanted = pipe(PROMPTS, latents=inputs.noise, output_type="pt", **arguments).images
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4)


def test_the_averages_are_shown_and_taken_out_again(teachers: dict[str, Path], tmp_path: Path) -> None:
    session = open_session(tiny_config(tmp_path, teachers["sd"], **SETTINGS))
    assert session.ema is not None
    with torch.no_grad():
        for average in session.ema.shadow_params:
            average.add_(1.0)
    before = {name: value.detach().clone() for name, value in session.trained.items()}
    with pytest.raises(KeyError), resulting_student(session) as student:
        assert not student.training
        assert all(torch.allclose(value, before[name] + 1.0) for name, value in student.named_parameters())
        raise KeyError  # also where drawing fails
    assert student.training and all(torch.equal(value, before[name]) for name, value in session.trained.items())


def test_tensorboard_gets_sheets_and_straightness(teachers: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_config(tmp_path, teachers["sd"], output__tracker="tensorboard", **SETTINGS), [Validation()])
    folder = next((tmp_path / "run").glob("perflow_distill/events.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Images("validation")] == [0, 3, 6]
    assert [event.step for event in events.Scalars("straightness/student_3")] == [0, 3, 6]
    assert {"straightness/teacher_0", "straightness/endpoint_error_1"} <= set(events.Tags()["scalars"])


def test_a_resumed_run_goes_on_with_the_readings(teachers: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_config(tmp_path, teachers["sd"], **SETTINGS), [Validation()])
    longer: dict[str, Any] = {"optimizer__max_steps": 8, "output__resume": "latest"}
    settings = {**SETTINGS, "output__validation_steps": "[4]"}
    result = train(tiny_config(tmp_path, teachers["sd"], **settings, **longer), [Validation()])
    assert [line["step"] for line in readings(result)] == [0, 3, 6, 8]


def test_steps_go_with_the_windows(teachers: dict[str, Path], tmp_path: Path) -> None:
    cases: list[tuple[int, dict[str, str], tuple[int, ...]]] = [
        (4, {}, (4, 6, 8)),
        (1, {}, (1, 2)),
        (2, {"output__validation_steps": "[2, 5]"}, (2, 5)),
    ]
    for windows, settings, expected in cases:
        settings |= {"windows__num_time_windows": str(windows)}
        config = tiny_config(tmp_path, teachers["sd"], **settings)
        assert student_steps(open_session(config)) == expected
