"""The report of a training in Markdown: curves, sheets, files and settings, read from what the run wrote down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ..atomic_files import atomic_path
from .config import DistillConfig
from .layout import PLOTS, READINGS, REPORT, SHEETS, by_step
from .output import Outputs
from .plots import Curve, save_plot
from .progress import read_lines
from .result import TrainingResult

_SHOWN_SHEETS = 4

Lines = list[dict[str, Any]]


def write_report(
    config: DistillConfig, result: TrainingResult, outputs: Outputs | None = None, evaluation: str | None = None
) -> Path:
    """Writes `report.md` into the training's directory and its plots beside.

    Args:
        config: of the training.
        result: what it left; its metrics are read.
        outputs: further files, if there are any.
        evaluation: tables in Markdown, if the student was evaluated.
    """
    metrics, readings = read_lines(result.metrics), read_lines(result.directory / READINGS)
    plots = _draw(metrics, readings, result.directory) if find_spec("matplotlib") is not None else {}
    parts = [
        f"# Distillation of {config.model.teacher}",
        _summary(config, result, metrics),
        "## Loss",
        *_losses(metrics, plots),
        *_straightness(readings, plots),
        *(["## Learning rate and speed", plots["learning_rate"], plots["speed"]] if "speed" in plots else []),
        *_sheets(result.directory),
        *(["## Evaluation", evaluation.strip()] if evaluation else []),
        "## Files",
        _files(result, outputs),
        "## Settings",
        f"```json\n{json.dumps(config.model_dump(mode='json'), indent=2)}\n```",
    ]
    path = result.directory / REPORT
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _summary(config: DistillConfig, result: TrainingResult, metrics: Lines) -> str:
    windows, teacher = config.windows, config.teacher
    student = "all weights" if config.model.student == "full" else f"LoRA of rank {config.model.lora_rank}"
    guidance = f"{teacher.guidance_scale:g}, baked in" if teacher.cfg_mode == "fixed" else "left to sampling"
    rows = {
        "updates": str(result.steps),
        "student": student,
        "windows": f"{windows.tile().num_windows} ({', '.join(f'{t:g}' for t in windows.tile().boundaries)})",
        "prediction type": windows.prediction_type,
        "teacher steps a window": str(teacher.steps_per_window),
        "guidance": guidance,
        "window starts": teacher.starts,
        "data": config.data.kind,
    }
    if metrics:
        rows["samples a second"] = f"{median(line['samples_per_second'] for line in metrics):.3g} (median)"
    return _table(["", ""], rows.items())


def _losses(metrics: Lines, plots: Mapping[str, str]) -> list[str]:
    if not metrics:
        return ["No losses were written down."]
    found = [plots["loss"]] if "loss" in plots else []
    losses = [loss for line in metrics for loss in line["losses"]]
    third = max(1, len(losses) // 3)
    first, last = (sum(part) / len(part) for part in (losses[:third], losses[-third:]))
    found.append(
        f"Mean loss of the first third of the updates: {first:.4g}; of the last third: {last:.4g}"
        + (f" ({last / first:.2f} times the first)." if first else ".")
    )
    rows = []
    for number in range(len(metrics[0]["window_losses"])):
        values = [line["window_losses"][number] for line in metrics if line["window_losses"][number] is not None]
        if values:
            part = max(1, len(values) // 3)
            rows.append([number + 1, f"{sum(values[:part]) / part:.4g}", f"{sum(values[-part:]) / part:.4g}"])
    found.append(_table(["window", "first third", "last third"], rows))
    return found


def _straightness(readings: Lines, plots: Mapping[str, str]) -> list[str]:
    if not readings:
        return []
    first, last = readings[0], readings[-1]
    rows = [
        [
            number + 1,
            *(f"{values[number]:.3g}" for values in (last["teacher"], first["student"], last["student"])),
            *(f"{values[number]:.3g}" for values in (first["endpoint_error"], last["endpoint_error"])),
        ]
        for number in range(len(last["student"]))
    ]
    header = ["window", "teacher's path", f"student's, {first['step']} updates", f"student's, {last['step']} updates"]
    header += [f"endpoint error, {first['step']} updates", f"endpoint error, {last['step']} updates"]
    return [
        "## Straightness",
        "The mean squared deviation of a path's velocity from that of its chord, over the squared speed along the "
        "chord: 0 is a line, which one Euler step solves exactly (arXiv 2209.03003, section 2). A line may lead to a "
        "wrong place, so the endpoint error stands beside it: the squared distance between where one step of the "
        "student and where the teacher end, over the squared length of the teacher's chord.",
        *(plots[name] for name in ("straightness", "endpoint_error") if name in plots),
        _table(header, rows),
    ]


def _sheets(directory: Path) -> list[str]:
    """The first sheet, the last, and some between, by links."""
    found = [path for _, path in by_step(directory / SHEETS, ".png")]
    if not found:
        return []
    count = min(_SHOWN_SHEETS, len(found))
    chosen = dict.fromkeys(found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count))
    return ["## Validation", *(f"![{path.stem}]({SHEETS}/{path.name})" for path in chosen)]


def _files(result: TrainingResult, outputs: Outputs | None) -> str:
    named: dict[str, Path | None] = {
        "student, a UNet": result.student,
        "delta (student less teacher, with the recipe)": result.delta,
        "scheduler": result.scheduler,
        "LoRA": result.lora,
        "readings during the training": result.metrics,
    }
    if outputs is not None:
        named |= {
            "LoRA": outputs.lora,
            "LoRA in kohya's keys": outputs.lora_kohya,
            "residual, to be merged beside the LoRA": outputs.lora_residual,
            "workflow repository, for `perflow push`": outputs.workflow,
        }
    rows = [[f"`{os.path.relpath(path, result.directory)}`", what] for what, path in named.items() if path is not None]
    note = f"\n\n{outputs.lora_summary}" if outputs is not None else ""
    return _table(["file", "what it is"], rows) + note


def _draw(metrics: Lines, readings: Lines, directory: Path) -> dict[str, str]:
    """Links to the plots by their names."""
    links: dict[str, str] = {}

    def plot(name: str, curves: Mapping[str, Curve], label: str, **options: Any) -> None:
        save_plot(directory / PLOTS / f"{name}.png", curves, label=label, **options)
        links[name] = f"![{label}]({PLOTS}/{name}.png)"

    if metrics:
        steps = [line["step"] for line in metrics]
        count = len(metrics[0]["window_losses"])
        means: list[float | None] = [sum(line["losses"]) / len(line["losses"]) for line in metrics]
        windows = {f"window {i + 1}": (steps, [line["window_losses"][i] for line in metrics]) for i in range(count)}
        plot("loss", {"weighted, all": (steps, means), **windows}, "loss", logarithmic=True)
        plot("learning_rate", {"rate": (steps, [line["learning_rate"] for line in metrics])}, "learning rate")
        plot("speed", {"speed": (steps, [line["samples_per_second"] for line in metrics])}, "samples a second")
    if readings:
        steps = [line["step"] for line in readings]
        count = len(readings[0]["student"])
        curves: dict[str, Curve] = {}
        for who in ("student", "teacher"):
            curves |= {f"{who}, window {i + 1}": (steps, [line[who][i] for line in readings]) for i in range(count)}
        dashed = frozenset(name for name in curves if name.startswith("teacher"))
        plot("straightness", curves, "relative straightness", logarithmic=True, dashed=dashed)
        errors = {f"window {i + 1}": (steps, [line["endpoint_error"][i] for line in readings]) for i in range(count)}
        plot("endpoint_error", errors, "relative endpoint error", logarithmic=True)
    return links


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
