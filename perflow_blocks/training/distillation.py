"""A whole distillation: what can be wrong with it, the training, what users want of its result, and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState

from ..atomic_files import require_writable_directory
from ..hub.export import require_target
from ..schedulers import PFODESolver
from .checkpoints import find_checkpoint
from .config import ConfigError, DistillConfig
from .data.opening import problems as data_problems
from .layout import DELTA, WORKFLOW
from .loop import Observer, train
from .output import write_outputs
from .report import write_report
from .step import WindowGeometry
from .student import empty_unet, frozen_weights, lora_modules
from .teacher_source import SDXL, open_teacher
from .validation import Validation

_FAR = 4  # times the teacher's own size: a step then takes more than 16 times as long


def distill(config: DistillConfig, observers: Sequence[Observer] = ()) -> Path:
    """Trains as configured with validation, and writes all outputs and the report; every process calls it.

    Returns:
        `output.directory`, where all of it is.

    Raises:
        ConfigError: with everything that is wrong, before any weight is read.
        DivergenceError: the training diverged; the last checkpoint before is kept.
        ValueError: weights, data or a checkpoint that cannot be read after all.
    """
    require_possible(config)
    train(config, [*observers, Validation()])
    if (state := PartialState()).is_main_process:
        summary, tables = "", ""
        try:
            summary = write_outputs(config, state.device)
            tables = _evaluate(config)
        finally:  # the training is done, so that it is reported even where an output fails
            write_report(config, summary, tables)
    return Path(config.output.directory)


def require_possible(config: DistillConfig) -> None:
    """Looks at what is cheap to see and often wrong; reads no weights and no images.

    Raises:
        ConfigError: with everything that is wrong.
    """
    if found := list(_problems(config)):
        raise ConfigError(found)


def _problems(config: DistillConfig) -> Iterator[str]:
    optional = {
        "peft": config.model.student == "lora",
        "bitsandbytes": config.optimizer.name == "adamw8bit",
        "torchmetrics": config.output.evaluation_prompts > 0,
        config.output.tracker: config.output.tracker is not None,
    }
    for package, is_needed in optional.items():
        if is_needed and find_spec(str(package)) is None:
            yield f"{package}, which these settings need, is not installed; pip install {package}."
    yield from data_problems(config.data)
    output = Path(config.output.directory)
    for check in (
        lambda: _require_teacher(config),
        lambda: require_writable_directory(output),
        lambda: find_checkpoint(config),
    ):
        try:
            check()
        except (ValueError, OSError, TypeError) as error:
            yield " ".join(str(error).split())


def _require_teacher(config: DistillConfig) -> None:
    """
    Raises:
        ValueError: the teacher cannot be distilled, or not with these settings.
    """
    source, side = open_teacher(config.model), config.data.resolution
    if source.scheduler_config.get("rescale_betas_zero_snr"):
        raise ValueError("model.teacher: its scheduler has rescale_betas_zero_snr, which makes a window singular.")
    PFODESolver(source.scheduler())
    WindowGeometry(config.windows, source.scheduler_config)
    lora_modules(empty_unet(source), config.model.lora_targets)
    frozen_weights(empty_unet(source), config.model.frozen)
    own = source.unet_config.get("sample_size")
    if side % source.vae_factor or (isinstance(own, int) and side > _FAR * own * source.vae_factor):
        raise ValueError(
            f"data.resolution={side} does not suit a teacher of {own} x {own} latents of {source.vae_factor} pixels; "
            f"pass a multiple of {source.vae_factor} near its own size."
        )
    if config.output.workflow and source.family is SDXL:
        require_target(Path(config.output.directory) / WORKFLOW, overwrite=True)


def _evaluate(config: DistillConfig) -> str:
    if not config.output.evaluation_prompts:
        return ""
    from ..evaluation.distilled import evaluate_distilled  # with packages that nothing else here needs

    return evaluate_distilled(config, Path(config.output.directory) / DELTA)
