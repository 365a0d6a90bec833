"""What a distillation leaves behind: the student, its difference from the teacher with the recipe, the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..atomic_files import atomic_directory
from ..delta.extract import extract_delta, save_delta
from ..delta.files import identity_of, open_weights
from ..delta.lora import DeltaLora, save_lora
from ..delta.recipe import DeltaRecipe
from ..schedulers import PeRFlowScheduler
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS
from .layout import DELTA, LORA, SCHEDULER, STUDENT
from .session import Session
from .student import frozen_weights, load_initial, lora_delta, lora_factors


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Where a finished training's files are.

    Attributes:
        directory: of all of them.
        steps: updates done.
        delta: the student less the teacher, with the recipe.
        scheduler: directory of the `PeRFlowScheduler`.
        student: directory of the UNet, for a student with full weights.
        lora: file of the factors, for a LoRA student.
        metrics: the readings during the training, as JSON lines.
    """

    directory: Path
    steps: int
    delta: Path
    scheduler: Path
    student: Path | None
    lora: Path | None
    metrics: Path


def recipe_of(session: Session) -> DeltaRecipe:
    """How the student is to be sampled."""
    config, windows = session.config, session.geometry.windows
    schedule = session.source.scheduler_config
    return DeltaRecipe(
        prediction_type=config.windows.prediction_type,
        num_time_windows=windows.num_windows,
        window_boundaries=None if config.windows.window_boundaries is None else windows.boundaries,
        num_inference_steps=config.output.num_inference_steps or windows.num_windows,
        guidance_scale=1.0 if config.teacher.cfg_mode == "fixed" else session.source.family.guidance_scale,
        base_model=session.source.label,
        scheduler_config={key: schedule[key] for key in NOISE_SCHEDULE_KEYS if schedule.get(key) is not None},
    )


def make_scheduler(session: Session) -> PeRFlowScheduler:
    """The scheduler that the student is sampled with."""
    recipe = recipe_of(session)
    return PeRFlowScheduler.from_scheduler(
        dict(session.source.scheduler_config),
        prediction_type=recipe.prediction_type,
        num_time_windows=recipe.num_time_windows,
        window_boundaries=recipe.window_boundaries,
    )


def student_state(session: Session) -> dict[str, Tensor]:
    """The student's state by the bare UNet's names, with averaged weights where there are. Every process calls it."""
    state: dict[str, Tensor] = session.accelerator.get_state_dict(session.student)
    if session.ema is not None:
        state |= dict(zip(session.trained, session.ema.shadow_params, strict=True))
    return state


def write_result(session: Session, steps: int, metrics: Path) -> TrainingResult:
    """Writes all files; each appears complete or not at all. Every process calls it, the main one writes."""
    state = student_state(session)
    directory = Path(session.config.output.directory)
    lora = session.config.model.student == "lora"
    result = TrainingResult(
        directory=directory,
        steps=steps,
        delta=directory / DELTA,
        scheduler=directory / SCHEDULER,
        student=None if lora else directory / STUDENT,
        lora=directory / LORA if lora else None,
        metrics=metrics,
    )
    if session.accelerator.is_main_process:
        recipe = recipe_of(session)
        if result.lora is not None:
            _write_lora(session, lora_factors(state), result.lora, result.delta, recipe)
        elif result.student is not None:
            _write_full(session, state, result.student, result.delta, recipe)
        with atomic_directory(result.scheduler) as temporary:
            make_scheduler(session).save_pretrained(temporary)
    session.accelerator.wait_for_everyone()
    return result


def _write_full(session: Session, state: Mapping[str, Tensor], folder: Path, delta: Path, recipe: DeltaRecipe) -> None:
    student = load_initial(session.source, session.config.model)
    student.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in state.items()})
    with atomic_directory(folder) as temporary:
        student.save_pretrained(temporary)
    base = session.source.load_unet(torch.float32)  # as stored: the teacher may have run in half precision
    frozen = frozen_weights(base, session.config.model.frozen)
    difference = {
        name: tensor for name, tensor in extract_delta(student, base).items() if name not in frozen or tensor.any()
    }
    save_delta(difference, delta, recipe, _dtype(session), partial=bool(frozen))


def _write_lora(session: Session, factors: Mapping[str, Tensor], lora: Path, delta: Path, recipe: DeltaRecipe) -> None:
    named = {f"unet.{name}": tensor.detach().float().cpu().contiguous() for name, tensor in factors.items()}
    save_delta(lora_delta(factors), delta, recipe, _dtype(session), partial=True)
    save_lora(DeltaLora(lora=named, recipe=recipe, digest=identity_of(open_weights(delta))), lora)


def _dtype(session: Session) -> torch.dtype:
    return getattr(torch, session.config.output.delta_dtype)
