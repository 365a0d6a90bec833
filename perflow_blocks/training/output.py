"""What a distillation leaves behind: the student, its delta with the recipe, LoRA forms, scheduler and workflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atomic_files import atomic_directory
from ..delta.extract import extract_delta, save_delta
from ..delta.files import identity_of, open_weights, read_recipe
from ..delta.lora import DeltaLora, delta_to_lora, save_lora, save_residual
from ..delta.recipe import DeltaRecipe
from ..schedulers import PeRFlowScheduler
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS
from .checkpoints import DELTA, LORA, LORA_KOHYA, LORA_RESIDUAL, SCHEDULER, STUDENT, WORKFLOW, sheet_path
from .config import DistillConfig
from .student import frozen_weights, lora_delta, lora_factors
from .teacher import SDXL, UNCONDITIONAL, TeacherSource, open_teacher

if TYPE_CHECKING:
    from .loop import Session


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


def write_result(session: Session) -> None:
    """Writes student (its averages, if there are any), delta and scheduler, each whole; every process calls it."""
    state: dict[str, Tensor] = session.accelerator.get_state_dict(session.student)
    if session.ema is not None:
        state |= dict(zip(session.trained, session.ema.shadow_params, strict=True))
    folder = Path(session.config.output.directory)
    if session.accelerator.is_main_process:
        (_write_lora if session.config.model.student == "lora" else _write_full)(session, state, folder)
        with atomic_directory(folder / SCHEDULER) as temporary:
            make_scheduler(session).save_pretrained(temporary)
    session.accelerator.wait_for_everyone()


def _write_full(session: Session, state: Mapping[str, Tensor], folder: Path) -> None:
    student = session.source.load_unet(torch.float32)
    student.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in state.items()})
    with atomic_directory(folder / STUDENT) as temporary:
        student.save_pretrained(temporary)
    base = session.source.load_unet(torch.float32)  # as stored: the teacher may have run in half precision
    frozen = frozen_weights(base, session.config.model.frozen)
    difference = {name: tensor for name, tensor in extract_delta(student, base).items() if name not in frozen}
    dtype = getattr(torch, session.config.output.delta_dtype)
    save_delta(difference, folder / DELTA, recipe_of(session), dtype, partial=bool(frozen))


def _write_lora(session: Session, state: Mapping[str, Tensor], folder: Path) -> None:
    factors, recipe = lora_factors(state), recipe_of(session)
    named = {f"unet.{name}": tensor.detach().float().cpu().contiguous() for name, tensor in factors.items()}
    dtype = getattr(torch, session.config.output.delta_dtype)
    save_delta(lora_delta(factors), folder / DELTA, recipe, dtype, partial=True)
    save_lora(DeltaLora(lora=named, recipe=recipe, digest=identity_of(open_weights(folder / DELTA))), folder / LORA)


def write_outputs(config: DistillConfig, device: torch.device | str | None = None) -> str:
    """Writes the LoRA forms of the delta and a workflow to push; says what the LoRA keeps of the delta."""
    source, folder = open_teacher(config.model), Path(config.output.directory)
    if source.family is UNCONDITIONAL:
        return ""  # diffusers has no LoRA for its UNet
    if config.model.student == "lora":
        delta, lora = open_weights(folder / DELTA), load_file(folder / LORA)
        converted = DeltaLora(lora=lora, recipe=read_recipe(delta), digest=identity_of(delta))
    else:
        dtype = getattr(torch, config.output.delta_dtype)
        converted = delta_to_lora(folder / DELTA, rank=config.model.lora_rank, dtype=dtype, device=device)
        save_lora(converted, folder / LORA)
    save_lora(converted, folder / LORA_KOHYA, "kohya")
    (folder / LORA_RESIDUAL).unlink(missing_ok=True)  # of an earlier run
    if converted.residual:
        save_residual(converted, folder / LORA_RESIDUAL)
    if config.output.workflow:
        _export(config, folder, source)
    return "The student is this LoRA." if config.model.student == "lora" else str(converted.report)


def describe(config: DistillConfig) -> str:
    """The distillation in a sentence's part, for reports and cards."""
    student = "all weights" if config.model.student == "full" else f"a LoRA of rank {config.model.lora_rank}"
    guidance = f"the teacher's guidance of {config.teacher.guidance_scale:g} baked in"
    return (
        f"{config.optimizer.max_steps} updates of {student}, {config.windows.tile().num_windows} windows with "
        f"{config.teacher.steps_per_window} teacher steps each, "
        f"{guidance if config.teacher.cfg_mode == 'fixed' else 'guidance left to sampling'}"
    )


def _export(config: DistillConfig, folder: Path, source: TeacherSource) -> None:
    """A thin workflow: of a teacher on the Hub a reference beside the delta, of any other the weights."""
    from ..blocks.block_source import SD_PRESET, SDXL_PRESET, make_preset
    from ..hub.export import export_workflow

    encoders = tuple(source.family.text_encoders)
    blocks: Any = make_preset(SDXL_PRESET if source.family is SDXL else SD_PRESET)
    if source.on_hub:  # no weights are loaded
        pipe = blocks.pipeline_class(blocks, source.location, revision=source.model.revision)
        for name, spec in pipe._component_specs.items():
            if spec.pretrained_model_name_or_path == source.location:
                spec.revision = source.model.revision
                spec.variant = source.model.variant if name in ("unet", "vae", *encoders) else None
    else:
        dtype = getattr(torch, config.output.delta_dtype)
        text, pipe = source.load_text_pipeline(dtype), blocks.init_pipeline()
        parts = {name: getattr(text, name) for name in (*encoders, *source.family.tokenizers, "scheduler")}
        parts |= {"unet": source.load_unet(dtype), "vae": source.load_vae(dtype)}
        name = "force_zeros_for_empty_prompt"
        pipe.update_components(**parts, **({name: text.config[name]} if source.family is SDXL else {}))
    sheet = sheet_path(folder, config.optimizer.max_steps)
    export_workflow(
        pipe,
        folder / WORKFLOW,
        mode="thin",
        weights="delta-only" if source.on_hub else "include",
        title=f"PeRFlow of {source.label}",
        notes=f"Distilled from {source.label} by `perflow distill`: {describe(config)}.",
        image=sheet if sheet.is_file() else None,
        delta=folder / DELTA,
        overwrite=True,
    )
