"""`perflow extract`: the delta of two checkpoints, into one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ..components.delta_recipe import DeltaRecipe


def extract(
    student: Annotated[Path, typer.Argument(help="The accelerated UNet: a file, or a UNet's or pipeline's folder.")],
    base: Annotated[Path, typer.Argument(help="The UNet that it was distilled from, likewise.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta, a .safetensors file.")],
    dtype: Annotated[str, typer.Option(help="Type to store: float16, float32 or bfloat16.")] = "float16",
    variant: Annotated[str | None, typer.Option(help="Which files of the student's folder, fp16 say.")] = None,
    base_variant: Annotated[str | None, typer.Option(help="Which files of the base's folder.")] = None,
    allow_pickle: options.AllowPickle = False,
    config: options.Config = None,
    prediction_type: Annotated[str | None, typer.Option(help="ddim_eps, diff_eps or velocity.")] = None,
    windows: Annotated[int | None, typer.Option(help="Number of time windows it was distilled for.")] = None,
    steps: options.RecipeSteps = None,
    guidance: options.RecipeGuidance = None,
    base_model: Annotated[str | None, typer.Option(help="Name of the base, such as its repository.")] = None,
    force: options.Force = False,
) -> None:
    """Write STUDENT minus BASE as a delta file, with the recipe to sample it by; reads one tensor at a time."""
    from ..components.delta_recipe import DeltaRecipe

    recipe = DeltaRecipe(
        prediction_type=prediction_type,
        num_time_windows=windows,
        num_inference_steps=steps,
        guidance_scale=guidance,
        base_model=base_model,
    )
    options.require_free_file("--out", out, force)
    options.require_weights("student", student)
    options.require_weights("base", base)
    precision = options.parse_dtype(dtype)
    from ..components.delta_files import open_difference
    from ..components.delta_fit import require_architecture
    from ..components.weight_layouts import open_weights
    from ..components.weight_writer import write_weights
    from .unets import find_config

    unet = find_config(config, base, student)
    weights = [open_weights(student, variant, allow_pickle=allow_pickle)]
    weights.append(open_weights(base, base_variant, allow_pickle=allow_pickle))
    if unet is not None:
        weights = [require_architecture(part, unet) for part in weights]
    else:
        original = [part.label for part in weights if any(".input_blocks." in f".{name}" for name in part.shapes)]
        if original:
            raise ValueError(
                f"{original[0]} has original Latent Diffusion names; pass --config with a folder of the UNet's "
                "config.json."
            )
    difference = open_difference(weights[0], weights[1])
    write_weights(difference, out, precision, _metadata(recipe, unet))
    typer.echo(f"{out}: {len(difference.shapes)} tensors, {out.stat().st_size / 1e6:,.1f} MB")


def _metadata(recipe: DeltaRecipe, unet: UNet2DConditionModel | None) -> dict[str, str]:
    from ..components.delta_fit import architecture_of
    from ..components.delta_recipe import ARCHITECTURE_KEY

    architecture = {} if unet is None else {ARCHITECTURE_KEY: architecture_of(unet)}
    return {"format": "pt", **recipe.to_metadata(), **architecture}
