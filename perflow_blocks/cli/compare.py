"""`perflow compare`: one prompt, drawn by the teacher and by PeRFlow, side by side with the times it took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..batches import require_prompts, save_image
from . import options
from .evaluate import TeacherGuidance, open_pipelines, open_samplers


def compare(
    prompt: Annotated[str, typer.Argument(help="What to draw, in quotes.")],
    model: options.Model = None,
    delta: options.Delta = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of the columns of few steps, one or more for each time window.")
    ] = 4,
    guidance: TeacherGuidance = None,
    seed: options.Seed = 0,
    num_images: options.NumImages = 3,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(dir_okay=False, help="The sheet, an image file.")] = Path("outputs/compare.png"),
) -> None:
    """Draw one prompt with the teacher in 50 steps, with DDIM in few steps, and with PeRFlow in as few."""
    from ..atomic_files import require_writable_directory
    from .pipeline import model_location

    require_prompts([prompt])
    require_writable_directory(out.parent)
    options.require_image_name("--out", out)
    model_location(model)
    if model is not None and delta is None:
        raise ValueError("--model without --delta leaves no teacher to compare with; pass a base and its delta.")
    place = options.choose_device(device)
    few_step, classic = open_pipelines(model, delta, None, None, place, options.choose_dtype(dtype, place))
    from ..evaluation.measure import EvaluationSet, comparison_sheet, evaluate_samplers
    from ..evaluation.samplers import seeded_latents

    specs = [("ddim", 50, None), ("ddim", steps, None), ("ddim", steps, 1.0), ("perflow", steps, None)]
    samplers = open_samplers(few_step, classic, specs, delta, guidance, embedded=model is None)
    seeds = range(seed, seed + num_images)
    data = EvaluationSet(prompts=[prompt] * num_images, latents=seeded_latents(classic, seeds))
    rows = evaluate_samplers(samplers, data)
    title = f"{prompt} (same noise in each row)"
    save_image(comparison_sheet(rows, [f"seed {number}" for number in seeds], title=title), out)
    typer.echo(out)
