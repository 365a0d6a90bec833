"""Tiny teachers, configurations and toys for the trainer's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from perflow_blocks.core.noise_schedule import make_alphas_cumprod
from perflow_blocks.schedulers.conditioning import Conditioning
from perflow_blocks.testing.tiny import BETAS, tiny_sd_components
from perflow_blocks.training.conditioning import TextRow
from perflow_blocks.training.config import DistillConfig, TeacherConfig, WindowConfig
from perflow_blocks.training.config_file import load_config
from perflow_blocks.training.geometry import WindowGeometry
from perflow_blocks.training.teacher import Teacher

from .builder_support import save_repository

SCHEDULE: dict[str, Any] = {**BETAS, "num_train_timesteps": 1000}
TINY = """
[model]
teacher = "{teacher}"
[data]
kind = "demo"
resolution = 32
bucket_step = 8
max_samples = 40
[teacher]
steps_per_window = 2
[optimizer]
learning_rate = 1e-3
warmup_steps = 0
max_steps = 6
batch_size = 2
[output]
directory = "{directory}"
log_every = 2
checkpoint_every = 3
"""


def save_teacher(folder: Path, family: str, scheduler: Any = None) -> Path:
    """A tiny pipeline of the family "sdxl" or "sd"."""
    scheduler = scheduler or DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    if family == "sdxl":
        return save_repository(folder, scheduler=scheduler)
    StableDiffusionPipeline(**tiny_sd_components(scheduler)).save_pretrained(folder)
    return folder


def write_config(folder: Path, teacher: Path | str, name: str = "run", text: str = TINY) -> Path:
    """A file of settings whose output goes to `folder/name`."""
    path = folder / f"{name}.toml"
    path.write_text(text.format(teacher=teacher, directory=folder / name))
    return path


def tiny_config(folder: Path, teacher: Path | str, name: str = "run", **overrides: object) -> DistillConfig:
    """The tiny configuration; overrides are named `section__field`."""
    texts = {key.replace("__", ".", 1): str(value) for key, value in overrides.items()}
    return load_config(write_config(folder, teacher, name), texts)


class PlainEncoder:
    """In a `PromptEncoder`'s place: the embedding of a prompt is its number."""

    empty = TextRow(torch.zeros(1, 1), None)

    def row(self, value: float) -> TextRow:
        return TextRow(torch.full((1, 1), value), None)

    def rows(self, prompts: Sequence[str]) -> list[TextRow]:
        return [self.row(float(prompt)) for prompt in prompts]

    def dropped(self, rows: Sequence[TextRow], drop: Sequence[bool]) -> list[TextRow]:
        return [self.empty if left_out else row for row, left_out in zip(rows, drop, strict=True)]

    def conditioning(self, rows: Sequence[TextRow], time_ids: Tensor) -> Conditioning:
        return Conditioning(prompt_embeds=torch.stack([row.prompt_embeds for row in rows]))

    def time_ids(self, *sizes: Any) -> Tensor:
        return torch.zeros(len(sizes[0]), 6)


class PointTeacher:
    """The exact noise prediction for data that is one picture: everywhere `mean` plus the prompt's number.

    DDIM solves its probability flow exactly, in any number of steps.
    """

    def __init__(self, mean: float = 0.5) -> None:
        self.mean = mean
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._alphas = make_alphas_cumprod(**SCHEDULE).float()

    def __call__(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        self.calls.append((timestep, encoder_hidden_states.flatten()))
        x0 = (self.mean + encoder_hidden_states.flatten()[:, None, None, None]).expand_as(sample)
        alpha = self._alphas[timestep.long()][:, None, None, None]
        return ((sample - alpha.sqrt() * x0) / (1.0 - alpha).sqrt(),)


def toy_teacher(
    unet: Any, windows: WindowConfig | None = None, prediction_type: str = "epsilon", **settings: Any
) -> Teacher:
    geometry = WindowGeometry(windows or WindowConfig(), SCHEDULE)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)
    return Teacher(unet, scheduler, PlainEncoder(), geometry, TeacherConfig(**settings))  # type: ignore[arg-type]
