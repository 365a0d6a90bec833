"""A whole distillation: what can be wrong with it, the training, what users want of its result, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState

from ..atomic_files import atomic_path, require_writable_directory
from ..schedulers import PFODESolver
from .checkpoints import (
    DELTA,
    METRICS,
    READINGS,
    REPORT,
    RESULTS,
    SHEETS,
    WORKFLOW,
    by_step,
    find_checkpoint,
    read_lines,
)
from .config import ConfigError, DistillConfig
from .data import open_rows
from .loop import Observer, train
from .output import describe, pipeline_of, write_outputs
from .student import empty_unet, frozen_weights, lora_modules
from .teacher import SDXL, WindowGeometry, open_teacher
from .validation import Validation

_PLOTS = "plots"
_FAR = 4  # times the teacher's own size: a step then takes more than 16 times as long
_SHOWN_SHEETS = 4
_ABOUT = """The mean squared deviation of the velocity of a student's path from that of its chord, over the squared
speed along the chord: 0 is a line, which one Euler step solves exactly (arXiv 2209.03003, section 2). A line may lead
to a wrong place, so the endpoint error is beside it: the squared distance between where one step of the student and
where the teacher end, over the squared length of the teacher's chord."""

Curves = Mapping[str, Sequence[float | None]]


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
    """Raises ConfigError with everything that is cheap to see and often wrong; reads no weights and no images."""
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
    PFODESolver(source.scheduler())
    WindowGeometry(config.windows, source.scheduler_config)
    if config.model.lora_targets or config.model.frozen:
        unet = empty_unet(source)
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


def _evaluate(config: DistillConfig) -> str:
    if not config.output.evaluation_prompts:
        return ""
    from ..demo.judge import evaluate_student  # with packages that nothing else here needs

    pipe = pipeline_of(open_teacher(config.model), torch.float32)
    scale = config.teacher.guidance_scale if config.teacher.cfg_mode == "fixed" else None
    return evaluate_student(pipe, Path(config.output.directory) / DELTA, config.output.evaluation_prompts, scale)


def write_report(config: DistillConfig, lora_summary: str = "", evaluation: str = "") -> Path:
    """Writes `report.md` and its plots, with what the LoRA keeps of the delta and tables of an evaluation."""
    directory = Path(config.output.directory)
    metrics, readings = read_lines(directory / METRICS), read_lines(directory / READINGS)
    present = [[f"`{name}`", what] for name, what in RESULTS.items() if (directory / name).exists()]
    try:
        curves = ["## Loss", *_loss(metrics, directory)] if metrics else []
        curves += ["## Straightness", _ABOUT, *_straightness(readings, directory)] if readings else []
    except (LookupError, TypeError) as error:
        raise ValueError(f"{METRICS} or {READINGS} in {directory} is damaged ({error!r}); move it away.") from error
    parts = [
        f"# Distillation of {config.model.teacher}",
        f"{describe(config)}.",
        *curves,
        *_sheets(directory),
        *(["## Evaluation", evaluation.strip()] if evaluation else []),
        "## Files",
        _table(["file", "what it is"], present),
        lora_summary,
        "## Settings",
        f"```json\n{json.dumps(config.model_dump(mode='json'), indent=2)}\n```",
    ]
    with atomic_path(directory / REPORT) as temporary:
        temporary.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    return directory / REPORT


def _loss(metrics: list[dict[str, Any]], directory: Path) -> list[str]:
    steps = [line["step"] for line in metrics]
    curves: dict[str, list[float | None]] = {"weighted, all": [fmean(line["losses"]) for line in metrics]}
    for number in range(len(metrics[0]["window_losses"])):
        curves[f"window {number + 1}"] = [line["window_losses"][number] for line in metrics]
    rows = [[name, *_thirds([value for value in curve if value is not None])] for name, curve in curves.items()]
    others = {name: {name: [line[name] for line in metrics]} for name in ("learning_rate", "samples_per_second")}
    return [
        _plot(directory, "loss", steps, curves),
        _table(["", "mean loss in the first third", "in the last third"], rows),
        *(_plot(directory, name, steps, curve, "linear") for name, curve in others.items()),
    ]


def _thirds(values: list[float]) -> list[str]:
    part = max(1, len(values) // 3)
    return [f"{fmean(some):.4g}" if some else "-" for some in (values[:part], values[-part:])]


def _straightness(readings: list[dict[str, Any]], directory: Path) -> list[str]:
    names, first, last = ("straightness", "endpoint_error"), readings[0], readings[-1]
    count = range(len(last[names[0]]))
    rows = [[i + 1, *(f"{reading[name][i]:.3g}" for name in names for reading in (first, last))] for i in count]
    header = [f"{name.replace('_', ' ')}, {reading['step']} updates" for name in names for reading in (first, last)]
    steps = [line["step"] for line in readings]
    curves = {name: {f"window {i + 1}": [line[name][i] for line in readings] for i in count} for name in names}
    return [*(_plot(directory, name, steps, curves[name]) for name in names), _table(["window", *header], rows)]


def _sheets(directory: Path) -> list[str]:
    """The first sheet, the last, and some between, by links."""
    found = [path for _, path in by_step(directory / SHEETS, ".png")]
    count = min(_SHOWN_SHEETS, len(found))
    chosen = dict.fromkeys(found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count))
    return ["## Validation", *(f"![{path.stem}]({SHEETS}/{path.name})" for path in chosen)] if found else []


def _plot(directory: Path, name: str, steps: Sequence[int], curves: Curves, scale: str = "log") -> str:
    """Draws curves over the updates, with gaps for None, into a PNG file; the link to it. Needs matplotlib."""
    if find_spec("matplotlib") is None:
        return ""
    from matplotlib.figure import Figure  # by itself: no backend is set for anyone

    figure: Any = Figure(figsize=(7.0, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        values = [float("nan") if value is None or (scale == "log" and value <= 0) else value for value in curve]
        axes.plot(steps, values, label=label, marker="o" if len(values) < 12 else None, markersize=3, linewidth=1.2)
    axes.set(yscale=scale, xlabel="updates", ylabel=name.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_path(directory / _PLOTS / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png")
    return f"![{name}]({_PLOTS}/{name}.png)"


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
