"""`perflow compare`: one prompt, drawn by the teacher and by PeRFlow, side by side with the times it took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .evaluate import open_pipelines, open_samplers, teacher_guidance
from .generate import save_png


def compare(
    prompt: Annotated[str, typer.Argument(help="What to draw, in quotes.")],
    model: options.Model = None,
    delta: options.Delta = None,
    steps: Annotated[int, typer.Option(help="Steps of the two columns of few steps, at least 4.")] = 4,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance of the teacher, at least 0. By default what the demo was distilled with, else 5."),
    ] = None,
    seed: options.Seed = 0,
    num_images: Annotated[int, typer.Option(help="Rows of the sheet, each with another seed, at least 1.")] = 3,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="The sheet, a PNG file.")] = Path("outputs/compare.png"),
) -> None:
    """Draw one prompt with the teacher in 50 steps, with DDIM in few steps, and with PeRFlow in as few."""
    options.require_prompts([prompt])
    _check(steps=steps, guidance=guidance, num_images=num_images, delta=delta, out=out)
    options.require_seeds(seed, num_images)
    place = options.choose_device(device)
    precision = options.choose_dtype(dtype, place)
    if model is not None and delta is None:
        raise ValueError("--model without --delta leaves no teacher to compare with; pass a base and its delta.")
    few_step, classic = open_pipelines(model, delta, None, None, place, precision)
    from ..evaluation.measure import EvaluationSet, comparison_sheet, evaluate_samplers
    from ..evaluation.samplers import seeded_latents

    specs = [("ddim", 50, None), ("ddim", steps, None), ("ddim", steps, 1.0), ("perflow", steps, None)]
    samplers = open_samplers(few_step, classic, specs, delta, teacher_guidance(guidance, embedded=model is None))
    seeds = range(seed, seed + num_images)
    data = EvaluationSet(prompts=[prompt] * num_images, latents=seeded_latents(classic, seeds))
    rows = evaluate_samplers(samplers, data)
    title = f"{prompt} (same noise in each row)"
    save_png(comparison_sheet(rows, [f"seed {number}" for number in seeds], title=title), out, {})
    typer.echo(str(out))


def _check(*, steps: int, guidance: float | None, num_images: int, delta: Path | None, out: Path) -> None:
    from ..atomic_files import require_writable_directory
    from ..core.windows import require_positive_int
    from ..delta.files import read_recipe
    from ..delta.recipe import require_guidance

    require_positive_int("steps", steps)
    if guidance is not None:
        require_guidance(guidance)
    require_positive_int("num-images", num_images)
    if delta is not None:
        read_recipe(delta)
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory; name a PNG file.")
    require_writable_directory(out.parent)
