"""The table of quality for a student that was just distilled from a teacher of the demo's pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from ..blocks.workflows import PeRFlowSDXLText2ImageBlocks
from ..demo import teacher_pipeline, weights_directory
from ..training.config import DistillConfig
from ..training.result import TrainingResult
from .classifier import load_classifier
from .comparison import evaluate_samplers, make_evaluation_set, report
from .samplers import SOLVERS, Sampler, perflow_sampler, teacher_sampler


def evaluate_distilled(config: DistillConfig, result: TrainingResult) -> str | None:
    """Tables in Markdown for `output.evaluation_prompts` prompts that no training draws; None where there are none.

    The teacher has its guidance under "fixed", and that which the student is sampled with otherwise.
    """
    count = config.output.evaluation_prompts
    if not count:
        return None
    directory = weights_directory() if config.model.teacher == "demo" else Path(config.model.teacher).expanduser()
    teacher = teacher_pipeline(directory)
    windows = config.windows.tile().num_windows
    steps = tuple(dict.fromkeys((windows, windows * 3 // 2, windows * 2)))
    students = [perflow_sampler(_student_pipeline(directory), number, delta=result.delta) for number in steps]
    scale = config.teacher.guidance_scale if config.teacher.cfg_mode == "fixed" else students[0].guidance_scale
    samplers: list[Sampler] = [teacher_sampler(teacher, "DDIM", 50, scale)]
    samplers += [teacher_sampler(teacher, solver, number, scale) for number in (8, 4) for solver in SOLVERS]
    rows = evaluate_samplers([*samplers, *students], make_evaluation_set(count), load_classifier(), teacher.vae)
    return report(rows)


def _student_pipeline(directory: Path) -> PeRFlowSDXLText2ImageBlocks:
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(directory))
    pipe.load_components(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
