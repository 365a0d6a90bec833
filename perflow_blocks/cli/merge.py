"""`perflow merge` and `perflow unmerge`: a delta into a saved UNet, and out of one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from . import options

Model = Annotated[Path, typer.Argument(help="Directory of a saved UNet, or of a pipeline with one.")]
Delta = Annotated[Path, typer.Argument(help="The delta: a .safetensors file or a folder of weights.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory for the UNet that results.")]
Variant = Annotated[str | None, typer.Option(help="Which files of the model's folder, fp16 say.")]
Dtype = Annotated[
    str | None, typer.Option(help=f"{', '.join(options.DTYPES)}, to save in. By default as the model is stored.")
]


def merge(
    model: Model,
    delta: Delta,
    out: Out,
    scale: Annotated[float, typer.Option(help="Factor of the delta: 1 as it was extracted, not 0.")] = 1.0,
    variant: Variant = None,
    dtype: Dtype = None,
    force: options.Force = False,
) -> None:
    """Write the UNet of MODEL with DELTA added; what was merged is recorded in its configuration."""
    if not math.isfinite(scale) or not scale:
        raise ValueError(f"--scale {scale} merges nothing; pass a finite number other than 0.")
    precision = None if dtype is None else options.parse_dtype(dtype)
    options.require_weights("delta", delta)
    from .unets import load_unet, require_free_directory, require_own_weights, require_unet, save_unet

    require_free_directory(out, force)
    folder = require_unet(model)
    from ..components.delta_fit import require_architecture
    from ..components.delta_merge import find_merged, merge_delta
    from ..components.weight_layouts import open_weights

    weights = open_weights(delta)
    require_architecture(weights, require_own_weights(folder, variant))
    with options.busy(f"merging {delta.name}"):
        unet = load_unet(folder, variant, precision)
        if find_merged(unet, weights) is not None:
            raise ValueError(f"{delta} is merged into {model} already; take it out with perflow unmerge first.")
        record = merge_delta(unet, weights, scale)
        save_unet(unet, out)
    typer.echo(f"{out}: {delta} merged at scale {record.scale:g}")


def unmerge(
    model: Model, delta: Delta, out: Out, variant: Variant = None, dtype: Dtype = None, force: options.Force = False
) -> None:
    """Write the UNet of MODEL with DELTA taken out again, at the scale it was merged with, but for a rounding."""
    precision = None if dtype is None else options.parse_dtype(dtype)
    options.require_weights("delta", delta)
    from .unets import load_unet, read_config, require_free_directory, require_own_weights, require_unet, save_unet

    require_free_directory(out, force)
    folder = require_unet(model)
    from ..components.delta_record import merge_records, saved_records

    if not saved_records(read_config(folder)):
        raise ValueError(f"the configuration of {folder} names no merged delta; pass what perflow merge wrote.")
    from ..components.delta_fit import require_architecture
    from ..components.delta_merge import unmerge_delta
    from ..components.weight_layouts import open_weights

    weights = open_weights(delta)
    require_architecture(weights, require_own_weights(folder, variant))
    with options.busy(f"taking out {delta.name}"):
        unet = load_unet(folder, variant, precision)
        (record,) = unmerge_delta(unet, weights, exact=False)
        save_unet(unet, out)
    left = f"; {', '.join(entry.source for entry in merge_records(unet))} left in it" if merge_records(unet) else ""
    typer.echo(
        f"{out}: {delta}, merged at scale {record.scale:g}, taken out{left}. A saved UNet has lost the base's last "
        "bits: weights may differ from the base's by a rounding."
    )
