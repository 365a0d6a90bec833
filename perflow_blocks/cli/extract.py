"""`perflow extract`: the delta of two checkpoints, into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options

SCHEDULER = "scheduler_config.json"


def extract(
    student: Annotated[
        Path, typer.Argument(exists=True, help="The accelerated UNet: a file, or a UNet's or pipeline's folder.")
    ],
    base: Annotated[Path, typer.Argument(exists=True, help="The UNet that it was distilled from, likewise.")],
    out: options.OutFile,
    dtype: options.StoredDtype = "float16",
    variant: options.Variant = None,
    base_variant: options.BaseVariant = None,
    prediction_type: Annotated[str | None, typer.Option(help="ddim_eps, diff_eps or velocity.")] = None,
    windows: Annotated[int | None, typer.Option(help="Number of time windows it was distilled for.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to recommend, at least 1.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance to recommend; 1 is none.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Name of the base, such as its repository.")] = None,
    scheduler: Annotated[
        Path | None, typer.Option(help="Folder of a scheduler with the base's noise schedule; else the base's own.")
    ] = None,
    force: options.Force = False,
) -> None:
    """Write STUDENT minus BASE as a delta file, with the recipe to sample it by; reads one tensor at a time."""
    from ..delta.recipe import DeltaRecipe

    recipe = DeltaRecipe(
        prediction_type=prediction_type,
        num_time_windows=windows,
        num_inference_steps=steps,
        guidance_scale=guidance,
        base_model=base_model,
        scheduler_config=_noise_schedule(scheduler, base),
    )
    options.require_free_file("--out", out, force)
    from ..delta.apply import require_architecture
    from ..delta.extract import open_difference, save_delta
    from ..delta.files import open_weights
    from .unets import find_config

    unet = find_config(base, student)
    weights = open_weights(student, variant), open_weights(base, base_variant)
    if unet is not None:
        for part in weights:
            require_architecture(part, unet)
    difference = open_difference(weights[0], weights[1])
    save_delta(difference, out, recipe, options.parse_dtype(dtype), progress=True)
    typer.echo(f"{out}: {len(difference.shapes)} tensors, {out.stat().st_size / 1e6:,.1f} MB")


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
