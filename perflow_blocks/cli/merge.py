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
Variant = Annotated[
    str | None,
    typer.Option(help="Which files of the model's folder, fp16 say. A result that replaces them is named so too."),
]
DeltaVariant = Annotated[
    str | None, typer.Option("--delta-variant", help="Which files of the delta's folder, if it has several.")
]
Dtype = Annotated[
    str | None, typer.Option(help=f"{', '.join(options.DTYPES)}, to save in. By default as the model is stored.")
]


def merge(
    model: Model,
    delta: Delta,
    out: Out,
    scale: Annotated[float, typer.Option(help="Factor of the delta: 1 as it was extracted, not 0.")] = 1.0,
    variant: Variant = None,
    delta_variant: DeltaVariant = None,
    dtype: Dtype = None,
    force: options.Force = False,
) -> None:
    """Write the UNet of MODEL with DELTA added; what was merged is recorded in its configuration."""
    if not math.isfinite(scale) or not scale:
        raise ValueError(f"--scale {scale} merges nothing; pass a finite number other than 0.")
    precision = None if dtype is None else options.parse_dtype(dtype)
    options.require_weights("delta", delta)
    from .unets import load_unet, require_free_directory, require_own_weights, require_unet, save_unet, stored_variant

    folder = require_unet(model)
    variant = stored_variant(folder, variant)
    written = require_free_directory(out, force, variant)
    from ..delta.apply import require_architecture
    from ..delta.files import open_weights
    from ..delta.merge import find_merged, merge_delta
    from .progress import busy

    weights = open_weights(delta, delta_variant)
    require_architecture(weights, require_own_weights(folder, variant))
    with busy(f"loading {folder}"):
        unet = load_unet(folder, variant, precision)
        if find_merged(unet, weights) is not None:
            raise ValueError(f"{delta} is merged into {model} already; take it out with perflow unmerge first.")
    with busy(f"merging {delta.name}"):
        record = merge_delta(unet, weights, scale, base=open_weights(folder, variant))
    with busy(f"writing {out}"):
        save_unet(unet, out, written)
    typer.echo(f"{out}: {delta} merged at scale {record.scale:g}")


def unmerge(
    model: Model,
    delta: Delta,
    out: Out,
    variant: Variant = None,
    delta_variant: DeltaVariant = None,
    dtype: Dtype = None,
    force: options.Force = False,
) -> None:
    """Write the UNet of MODEL with DELTA taken out again, at the scale it was merged with, but for a rounding."""
    precision = None if dtype is None else options.parse_dtype(dtype)
    options.require_weights("delta", delta)
    from . import unets

    folder = unets.require_unet(model)
    variant = unets.stored_variant(folder, variant)
    written = unets.require_free_directory(out, force, variant)
    from ..delta.merge import merge_records, saved_records

    if not saved_records(unets.read_config(folder)):
        raise ValueError(f"the configuration of {folder} names no merged delta; pass what perflow merge wrote.")
    from ..delta.apply import require_architecture
    from ..delta.files import open_weights
    from ..delta.merge import unmerge_delta
    from .progress import busy

    weights = open_weights(delta, delta_variant)
    require_architecture(weights, unets.require_own_weights(folder, variant))
    with busy(f"loading {folder}"):
        unet = unets.load_unet(folder, variant, precision)
    with busy(f"taking out {delta.name}"):
        (record,) = unmerge_delta(unet, weights, exact=False)
    with busy(f"writing {out}"):
        unets.save_unet(unet, out, written)
    left = f"; {', '.join(entry.source for entry in merge_records(unet))} left in it" if merge_records(unet) else ""
    typer.echo(
        f"{out}: {delta}, merged at scale {record.scale:g}, taken out{left}. A saved UNet has lost the base's last "
        "bits: weights may differ from the base's by a rounding."
    )
