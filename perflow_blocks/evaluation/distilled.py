"""The table of quality for a student that was just distilled from a teacher of the demo's pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from ..training.config import DistillConfig
from ..training.output import pipeline_of
from ..training.teacher import open_teacher
from .classifier import load_classifier
from .comparison import evaluate_samplers, make_evaluation_set, report
from .samplers import SOLVERS, Sampler, perflow_sampler, teacher_sampler


def evaluate_distilled(config: DistillConfig, delta: Path) -> str:
    """Tables in Markdown for `output.evaluation_prompts` prompts that no training draws.

    The teacher has its guidance under "fixed", and that which the student is sampled with otherwise.
    """
    source = open_teacher(config.model)
    student = pipeline_of(source, torch.float32)
    student.set_progress_bar_config(disable=True)
    parts = {name: getattr(student, name) for name in ("vae", *source.family.text_encoders, *source.family.tokenizers)}
    teacher = StableDiffusionXLPipeline(
        **parts, unet=source.load_unet(), scheduler=source.scheduler(), **source.pipeline_settings()
    )
    windows = config.windows.tile().num_windows
    steps = tuple(dict.fromkeys((windows, windows * 3 // 2, windows * 2)))
    students = [perflow_sampler(student, number, delta=delta) for number in steps]
    scale = config.teacher.guidance_scale if config.teacher.cfg_mode == "fixed" else students[0].guidance_scale
    samplers: list[Sampler] = [teacher_sampler(teacher, "DDIM", 50, scale)]
    samplers += [teacher_sampler(teacher, solver, number, scale) for number in (8, 4) for solver in SOLVERS]
    prompts = make_evaluation_set(config.output.evaluation_prompts)
    return report(evaluate_samplers([*samplers, *students], prompts, load_classifier(), teacher.vae))
