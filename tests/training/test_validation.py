"""Validation shows what users will get, measures ends, and leaves the training as it would be without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from perflow_blocks.core.distillation import student_output
from perflow_blocks.training.checkpoints import sheet_path
from perflow_blocks.training.config import WindowConfig
from perflow_blocks.training.loop import Session, train
from perflow_blocks.training.output import make_scheduler
from perflow_blocks.training.teacher import WindowGeometry
from perflow_blocks.training.validation import (
    Inputs,
    Validation,
    endpoint_errors,
    fixed_inputs,
    ratios,
    resulting_student,
    student_latents,
    teacher_edges,
    teacher_latents,
)
from tests.training.conftest import PlainEncoder, PointTeacher, tiny_config, toy_teacher

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

PROMPTS = ["a red star", "a ring"]
SETTINGS: dict[str, Any] = {
    "output__validation_every": 3,
    "output__validation_prompts": json.dumps(PROMPTS),
    "output__validation_teacher_steps": 5,
    "optimizer__ema_decay": 0.5,
}
HALF: dict[str, Any] = {"optimizer__mixed_precision": "bf16", "teacher__dtype": "bfloat16"}


def readings(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sdxl", {"output__tracker": "tensorboard"}),
        ("sd", {**HALF, "model__student": "lora", "output__validation_every": 6, "output__validation_steps": "[4]"}),
    ],
)
def test_it_shows_the_student_and_changes_nothing(
    family: str, settings: dict[str, Any], teachers: dict[str, Path], tmp_path: Path
) -> None:
    seen, unseen, settings = tmp_path / "seen", tmp_path / "unseen", {**SETTINGS, **settings}
    steps = list(range(0, 7, settings["output__validation_every"]))
    train(tiny_config(tmp_path, teachers[family], "seen", **settings), [Validation()])
    train(tiny_config(tmp_path, teachers[family], "unseen", **{**settings, "output__validation_every": "null"}))
    one, other = (load_file(run / "delta.safetensors") for run in (seen, unseen))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [line["step"] for line in readings(seen)] == steps and not (unseen / "validation").exists()
    found = [value for line in readings(seen) for value in line["endpoint_error"]]
    assert len(found) == len(steps) * 4 and all(value >= 0 for value in found)
    sheets = [sheet_path(seen, step) for step in steps]
    assert sorted((seen / "validation").iterdir()) == sheets
    with Image.open(sheets[0]) as first, Image.open(sheets[-1]) as last:
        assert first.size == last.size and first.tobytes() != last.tobytes()
        assert first.width > (2 if "output__validation_steps" in settings else 4) * 192  # teacher and numbers of steps
    if "output__tracker" in settings:
        events = EventAccumulator(str(next(seen.glob("perflow_distill/events.*")).parent))
        events.Reload()
        assert [event.step for event in events.Images("validation")] == steps
        assert [event.step for event in events.Scalars("endpoint_error/window_3")] == steps
    settings |= {"optimizer__max_steps": 7, "output__resume": "latest", "output__validation_steps": "[4]"}
    train(tiny_config(tmp_path, teachers[family], "seen", **settings), [Validation()])
    assert [line["step"] for line in readings(seen)] == [*steps, 7]


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_images_are_those_of_diffusers_pipelines(family: str, teachers: dict[str, Path], tmp_path: Path) -> None:
    session = Session(tiny_config(tmp_path, teachers[family], **SETTINGS, teacher__cfg_mode="fixed", teacher__order=1))
    pipe: Any = (StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline).from_pretrained(
        teachers[family], unet=session.accelerator.unwrap_model(session.student)
    )
    pipe.set_progress_bar_config(disable=True)
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    inputs = fixed_inputs(session)[1]
    size = session.config.data.resolution
    arguments: dict[str, Any] = {"height": size, "width": size, "latents": inputs.noise, "output_type": "latent"}
    for scheduler, steps, scale in (
        (ddim, 5, 7.5),
        (make_scheduler(session), 6, 3.0),
        (make_scheduler(session), 4, 1.0),
    ):
        pipe.scheduler = scheduler
        wanted = pipe(PROMPTS[1], num_inference_steps=steps, guidance_scale=scale, **arguments).images
        with torch.no_grad():
            if scheduler is ddim:
                drawn = teacher_latents(session, inputs)
            else:
                drawn = student_latents(pipe.unet, session.teacher, scheduler, inputs, steps, scale)
        torch.testing.assert_close(drawn, wanted, rtol=1e-3, atol=1e-3)


def test_the_averages_are_shown_and_taken_out_again(teachers: dict[str, Path], tmp_path: Path) -> None:
    session = Session(tiny_config(tmp_path, teachers["sd"], **SETTINGS))
    assert session.ema is not None
    for average in session.ema.shadow_params:
        average.add_(1.0)
    before = {name: value.detach().clone() for name, value in session.trained.items()}
    with pytest.raises(KeyError), resulting_student(session) as student:
        assert not student.training
        assert all(torch.allclose(value, before[name] + 1.0) for name, value in student.named_parameters())
        raise KeyError  # also where drawing fails
    assert student.training and all(torch.equal(value, before[name]) for name, value in session.trained.items())


def inputs_of(seed: int) -> Inputs:
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Inputs("", PlainEncoder().conditioning([1.0]), noise)


class Lines:
    """A student that knows where the teacher ends: the line there, or the way back where `sign` is -1."""

    def __init__(self, edges: list[Tensor], geometry: WindowGeometry, sign: float) -> None:
        self.outputs = [
            student_output(start, start + sign * (end - start), window, geometry.config.prediction_type)
            for start, end, window in zip(edges, edges[1:], geometry.each(1), strict=False)
        ]

    def __call__(self, sample: Tensor, timestep: Tensor, **more: Any) -> tuple[Tensor]:
        return (self.outputs[int((1000 - timestep[0].item()) / 250 + 1e-4)],)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_error_says_whether_a_line_leads_to_the_teacher_s_end(sign: float) -> None:
    teacher = toy_teacher(PointTeacher(), WindowConfig(prediction_type="velocity"), steps_per_window=5)
    edges = teacher_edges(teacher, inputs_of(3))
    student = Lines(edges, teacher.geometry, sign)
    errors = ratios([endpoint_errors(student, teacher.geometry, inputs_of(3), edges)])
    assert errors == pytest.approx([1e-12 if sign > 0 else 4.0] * 4, rel=1e-3, abs=1e-8)  # twice the chord away
