"""What users of an accelerator want besides it: LoRA forms of the delta, and a workflow repository to push."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from ..blocks.auto_blocks import PeRFlowSDXLAutoBlocks
from ..blocks.saving import is_stock
from ..delta.files import identity_of, open_weights, read_recipe
from ..delta.lora import DeltaLora, delta_to_lora, save_lora, save_residual
from ..hub.export import export_workflow, referring_pipeline
from .config import DistillConfig
from .families import SDXL
from .layout import LORA, LORA_KOHYA, LORA_RESIDUAL, WORKFLOW, sheet_path
from .result import TrainingResult
from .teacher_source import TeacherSource, open_teacher

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files beside those of the training itself.

    Attributes:
        lora: in the keys of peft and diffusers.
        lora_kohya: the same, in those of other programs.
        lora_residual: what a LoRA cannot hold, to be merged beside it; None where it holds all.
        lora_summary: what the LoRA keeps of the delta.
        workflow: directory for `perflow push`; None for families without blocks, or where none is wanted.
    """

    lora: Path
    lora_kohya: Path
    lora_residual: Path | None
    lora_summary: str
    workflow: Path | None


def write_outputs(config: DistillConfig, result: TrainingResult, device: torch.device | str | None = None) -> Outputs:
    """Writes all of it into the training's directory; each file or directory appears complete or not at all.

    Args:
        config: of the training.
        result: what it left.
        device: where a full student's delta is factorised; by default the CPU.
    """
    source = open_teacher(config.model)
    converted = _read_lora(result) if result.lora is not None else _convert(config, result, device)
    residual = result.directory / LORA_RESIDUAL
    residual.unlink(missing_ok=True)  # of an earlier run
    if result.lora is None:
        save_lora(converted, result.directory / LORA)
    save_lora(converted, result.directory / LORA_KOHYA, "kohya")
    if converted.residual:
        save_residual(converted, residual)
    workflow: Path | None = None
    if config.output.workflow and source.family is SDXL:
        workflow = _export(config, result, source)
    elif config.output.workflow:
        logger.info("%s has no workflow blocks; use the student or its LoRA with a PeRFlowScheduler.", source.label)
    return Outputs(
        lora=result.directory / LORA,
        lora_kohya=result.directory / LORA_KOHYA,
        lora_residual=residual if converted.residual else None,
        lora_summary="The student is this LoRA." if result.lora is not None else str(converted.report),
        workflow=workflow,
    )


def _convert(config: DistillConfig, result: TrainingResult, device: torch.device | str | None) -> DeltaLora:
    dtype = getattr(torch, config.output.delta_dtype)
    return delta_to_lora(result.delta, rank=config.model.lora_rank, dtype=dtype, device=device)


def _read_lora(result: TrainingResult) -> DeltaLora:
    assert result.lora is not None
    delta = open_weights(result.delta)
    return DeltaLora(lora=load_file(result.lora), recipe=read_recipe(delta), digest=identity_of(delta))


def _export(config: DistillConfig, result: TrainingResult, source: TeacherSource) -> Path:
    """A thin workflow: of a teacher on the Hub a reference beside the delta, of any other the weights."""
    sheet = sheet_path(result.directory, result.steps)
    pipe = _referring(source) if source.on_hub else pipeline_of(source, getattr(torch, config.output.delta_dtype))
    return export_workflow(
        pipe,
        result.directory / WORKFLOW,
        mode="thin",
        weights="delta-only" if source.on_hub else "include",
        title=f"PeRFlow of {source.label}",
        notes=_notes(config, result, source),
        picture=sheet if sheet.is_file() else None,
        delta=result.delta,
        overwrite=True,
    )


def _notes(config: DistillConfig, result: TrainingResult, source: TeacherSource) -> str:
    student = "all weights" if config.model.student == "full" else f"a LoRA of rank {config.model.lora_rank}"
    guidance = (
        f"the teacher's guidance of {config.teacher.guidance_scale:g} baked in"
        if config.teacher.cfg_mode == "fixed"
        else "guidance left to sampling"
    )
    return (
        f"Distilled from {source.label} by `perflow distill`: {result.steps} updates of {student}, "
        f"{config.windows.tile().num_windows} windows with {config.teacher.steps_per_window} teacher steps each, "
        f"{guidance}."
    )


def _referring(source: TeacherSource) -> Any:
    """A pipeline that names the teacher's repository; nothing is loaded or asked for."""
    scheduler = getattr(diffusers, str(source.scheduler_config.get("_class_name")), None)
    kinds: dict[str, type] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        **source.family.text_encoders,
        **dict.fromkeys(source.family.tokenizers, CLIPTokenizer),
        "scheduler": scheduler if scheduler is not None and is_stock(scheduler) else EulerDiscreteScheduler,
    }
    places = {
        name: {
            "type_hint": kind,
            "pretrained_model_name_or_path": source.location,
            "subfolder": name,
            "variant": None if name == "scheduler" or kind is CLIPTokenizer else source.variant,
            "revision": source.revision,
        }
        for name, kind in kinds.items()
    }
    return referring_pipeline(PeRFlowSDXLAutoBlocks(), places, **_settings(source))


def pipeline_of(source: TeacherSource, dtype: torch.dtype) -> Any:
    """A PeRFlow pipeline with the parts of an SDXL teacher, on the CPU."""
    text = source.load_text_pipeline(dtype)
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline()
    pipe.update_components(
        unet=source.load_unet(dtype),
        vae=source.load_vae(dtype),
        scheduler=source.scheduler(),
        **{name: getattr(text, name) for name in (*source.family.text_encoders, *source.family.tokenizers)},
        **_settings(source),
    )
    return pipe


def _settings(source: TeacherSource) -> dict[str, Any]:
    """The configuration values that are not as the blocks have them by default."""
    return {"force_zeros_for_empty_prompt": source.pipeline_settings()["force_zeros_for_empty_prompt"]}
