"""`perflow extract`: the delta of two checkpoints, into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import options

SCHEDULER = "scheduler_config.json"
NO_RECIPE = (
    "Warning: the file will not say how to sample it; pass --prediction-type, --windows, --steps and --guidance, else "
    "users have to know them."
)


def extract(
    student: Annotated[
        Path, typer.Argument(exists=True, help="The accelerated UNet: a file, or a UNet's or pipeline's folder.")
    ],
    base: Annotated[Path, typer.Argument(exists=True, help="The UNet that it was distilled from, likewise.")],
    out: options.OutFile,
    dtype: options.StoredDtype = "float16",
    variant: options.Variant = None,
    base_variant: options.BaseVariant = None,
    prediction_type: Annotated[
        Literal["ddim_eps", "diff_eps", "velocity"] | None, typer.Option(help="What the student predicts.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Number of its time windows.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to recommend.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance to recommend; 1 is none.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Name of the base, such as its repository.")] = None,
    scheduler: Annotated[
        Path | None, options.path("Scheduler folder with the noise schedule, else the base's.")
    ] = None,
    force: options.Force = False,
) -> None:
    """Write STUDENT minus BASE as a delta file, with the recipe to sample it by; reads one tensor at a time."""
    options.require_free_file("--out", out, force)
    from ..delta.recipe import DeltaRecipe

    recipe = DeltaRecipe(
        prediction_type=prediction_type,
        num_time_windows=windows,
        num_inference_steps=steps,
        guidance_scale=guidance,
        base_model=base_model,
        scheduler_config=_noise_schedule(scheduler, base),
    )
    from ..delta.apply import require_architecture
    from ..delta.extract import changed_weights, open_difference, save_delta
    from ..delta.files import open_weights
    from .unets import find_config

    unet = find_config(base, student)
    weights = open_weights(student, variant), open_weights(base, base_variant)
    if unet is not None:
        for part in weights:
            require_architecture(part, unet)
    difference = changed_weights(open_difference(weights[0], weights[1]))
    left = len(weights[1].shapes) - len(difference.shapes)
    save_delta(difference, out, recipe, options.parse_dtype(dtype), partial=left > 0, progress=True)
    without = f" ({left} without a difference left out)" if left else ""
    typer.echo(f"{out}: {len(difference.shapes)} tensors{without}, {out.stat().st_size / 1e6:,.1f} MB")
    if (prediction_type, windows, steps, guidance) == (None,) * 4:
        typer.echo(NO_RECIPE, err=True)


def _noise_schedule(scheduler: Path | None, base: Path) -> dict[str, Any] | None:
    """That of the scheduler which is named, or lies in the pipeline of the base; None where there is none."""
    folders = [scheduler] if scheduler is not None else [base / "scheduler", base.parent / "scheduler"]
    file = next((folder / SCHEDULER for folder in folders if (folder / SCHEDULER).is_file()), None)
    if file is None:
        if scheduler is not None:
            raise ValueError(f"--scheduler {scheduler} holds no {SCHEDULER}; pass a pipeline's scheduler folder.")
        return None
    from ..delta.files import read_json
    from ..delta.recipe import noise_schedule_of

    return noise_schedule_of(read_json(file)) or None
