"""A whole distillation: what can be wrong with it, the training, what users want of its result, and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState

from ..atomic_files import atomic_path, require_writable_directory
from ..schedulers import PFODESolver
from .checkpoints import METRICS, READINGS, REPORT, RESULTS, SHEETS, WORKFLOW, by_step, find_checkpoint, read_lines
from .config import ConfigError, DistillConfig
from .data import open_rows
from .loop import Observer, train
from .output import describe, write_outputs
from .student import frozen_weights, lora_modules
from .teacher import SDXL, UNCONDITIONAL, WindowGeometry, open_teacher
from .validation import Validation

_PLOTS = "plots"
_FAR = 4  # times the teacher's own size: a step then takes more than 16 times as long


def distill(config: DistillConfig, observers: Sequence[Observer] = ()) -> Path:
    """Trains with validation and writes all outputs into `output.directory`, which it returns; every process calls it.

    Raises:
        ConfigError: with everything that is wrong, before any weight is read.
        DivergenceError: the training diverged; the last checkpoint before is kept.
        ValueError: weights, data or a checkpoint that cannot be read after all.
    """
    require_possible(config)
    train(config, [*observers, Validation()])
    if (state := PartialState()).is_main_process:
        summary = ""
        try:
            summary = write_outputs(config, state.device)
        finally:  # the training is done, so that it is reported even where an output fails
            write_report(config, summary)
    return Path(config.output.directory)


def require_possible(config: DistillConfig) -> None:
    """Raises ConfigError with everything that is cheap to see and often wrong; reads no weights and no images."""
    if found := list(_problems(config)):
        raise ConfigError(found)


def _problems(config: DistillConfig) -> Iterator[str]:
    optional = {
        "peft": config.model.student == "lora",
        "bitsandbytes": config.optimizer.name == "adamw8bit",
        config.output.tracker: config.output.tracker is not None,
    }
    for package, is_needed in optional.items():
        if is_needed and find_spec(str(package)) is None:
            yield f"{package}, which these settings need, is not installed; pip install {package}."
    checks: dict[Callable[[Any], object], object] = {
        _require_teacher: config,
        open_rows: config.data,
        require_writable_directory: Path(config.output.directory),
        find_checkpoint: config,
    }
    for check, subject in checks.items():
        try:
            check(subject)
        except (ValueError, OSError, TypeError) as error:
            yield " ".join(str(error).split())


def _require_teacher(config: DistillConfig) -> None:
    """Raises ValueError where the teacher cannot be distilled, or not with these settings."""
    source, side = open_teacher(config.model), config.data.resolution
    if source.scheduler_config.get("rescale_betas_zero_snr"):
        raise ValueError("model.teacher: its scheduler has rescale_betas_zero_snr, which makes a window singular.")
    if source.family is UNCONDITIONAL:
        if config.teacher.cfg_mode == "fixed" and config.teacher.guidance_scale > 1.0:
            raise ValueError("teacher.cfg_mode=fixed: a model without prompts has no guidance; pass sync.")
        if config.model.student == "lora":
            raise ValueError("model.student=lora: diffusers has no LoRA for a UNet2DModel; pass full.")
    PFODESolver(source.scheduler())
    WindowGeometry(config.windows, source.scheduler_config)
    if config.model.lora_targets or config.model.frozen:
        with torch.device("meta"):  # without values
            unet = source.family.unet.from_config(dict(source.unet_config))
        lora_modules(unet, config.model.lora_targets)
        frozen_weights(unet, config.model.frozen)
    own = source.unet_config.get("sample_size")
    if side % source.vae_factor or (isinstance(own, int) and side > _FAR * own * source.vae_factor):
        raise ValueError(
            f"data.resolution={side} does not suit a teacher of {own} x {own} latents of {source.vae_factor} pixels; "
            f"pass a multiple of {source.vae_factor} near its own size."
        )
    if config.output.workflow and source.family is SDXL:
        from ..hub.export import require_target

        require_target(Path(config.output.directory) / WORKFLOW, overwrite=True)


def write_report(config: DistillConfig, lora_summary: str = "") -> Path:
    """Writes `report.md` and its plots, with what the LoRA keeps of the delta."""
    directory = Path(config.output.directory)
    metrics, readings = read_lines(directory / METRICS), read_lines(directory / READINGS)
    present = [f"`{name}`" for name in RESULTS if (directory / name).exists()]
    sheets = [f"![{path.stem}]({SHEETS}/{path.name})" for _, path in by_step(directory / SHEETS, ".png")]
    try:
        curves = ["## Loss", *_curves(directory, "loss", metrics, "window_losses")] if metrics else []
        if readings:
            about = "Squared distance of the student's end from the teacher's, over the squared length of its chord."
            curves += ["## Endpoint error", about, *_curves(directory, "endpoint_error", readings, "endpoint_error")]
    except (LookupError, TypeError) as error:
        raise ValueError(f"{METRICS} or {READINGS} in {directory} is damaged ({error!r}); move it away.") from error
    parts = [
        f"# Distillation of {config.model.teacher}",
        f"{describe(config)}.",
        *curves,
        *(["## Validation", *sheets] if sheets else []),
        f"## Files\n\n{', '.join(present)}",
        lora_summary,
        "## Settings",
        f"```json\n{json.dumps(config.model_dump(mode='json'), indent=2)}\n```",
    ]
    with atomic_path(directory / REPORT) as temporary:
        temporary.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    return directory / REPORT


def _curves(directory: Path, name: str, lines: list[dict[str, Any]], key: str) -> list[str]:
    """A table of the windows' figures in the first and last third of the readings and, by matplotlib, their plot."""
    curves = {f"window {i + 1}": [line[key][i] for line in lines] for i in range(len(lines[0][key]))}
    table = ["| | mean of the first third | of the last third |", "|---|---|---|"]
    for label, curve in curves.items():
        known = [value for value in curve if value is not None]
        part = max(1, len(known) // 3)
        first, last = (f"{fmean(some):.4g}" if some else "-" for some in (known[:part], known[-part:]))
        table.append(f"| {label} | {first} | {last} |")
    if find_spec("matplotlib") is None:
        return ["\n".join(table)]
    from matplotlib.figure import Figure  # by itself: no backend is set for anyone

    figure: Any = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        values = [value or math.nan for value in curve]
        axes.plot([line["step"] for line in lines], values, label=label, marker=".")
    axes.set(yscale="log", xlabel="updates", ylabel=name.replace("_", " "))
    axes.legend()
    with atomic_path(directory / _PLOTS / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png")
    return [f"![{name}]({_PLOTS}/{name}.png)", "\n".join(table)]
