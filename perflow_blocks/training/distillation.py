"""A whole distillation: the training, what users want of its result, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from .config import DistillConfig
from .loop import Observer, train
from .output import Outputs, pipeline_of, write_outputs
from .report import write_report
from .result import TrainingResult
from .teacher_source import open_teacher
from .validation import Validation


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a distillation left behind.

    Attributes:
        result: of the training.
        outputs: further forms of it; None in processes other than the main one.
        report: Markdown; likewise.
    """

    result: TrainingResult
    outputs: Outputs | None
    report: Path | None


def distill(config: DistillConfig, observers: Sequence[Observer] = ()) -> Distillation:
    """Trains as configured with validation, and writes all outputs and the report; every process calls it.

    Raises:
        ConfigError: with everything that stands in the way, before any weight is read.
        DivergenceError: the training diverged; the last checkpoint before is kept.
        ValueError: weights or data that cannot be read after all.
    """
    result = train(config, [*observers, Validation()])
    state = PartialState()
    if not state.is_main_process:
        return Distillation(result=result, outputs=None, report=None)
    outputs, tables = None, None
    try:
        outputs = write_outputs(config, result, state.device)
        tables = _evaluate(config, result)
    finally:  # the training is done, so that it is reported even where an output fails
        report = write_report(config, result, outputs, tables)
    return Distillation(result=result, outputs=outputs, report=report)


def _evaluate(config: DistillConfig, result: TrainingResult) -> str | None:
    if not config.output.evaluation_prompts:
        return None
    from ..demo.judge import evaluate_student  # with packages that nothing else here needs

    pipe = pipeline_of(open_teacher(config.model), torch.float32)
    scale = config.teacher.guidance_scale if config.teacher.cfg_mode == "fixed" else None
    return evaluate_student(pipe, result.delta, config.output.evaluation_prompts, scale)
