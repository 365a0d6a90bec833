"""`perflow merge` and `perflow unmerge`: a delta into a saved UNet, and out of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import options

Model = Annotated[Path, typer.Argument(exists=True, help="Directory of a saved UNet, or of a pipeline with one.")]
Out = Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Directory for the UNet that results.")]
Variant = Annotated[
    str | None,
    typer.Option(help="Which files of the model's folder, fp16 say. A result that replaces them is named so too."),
]
DeltaVariant = Annotated[str | None, typer.Option(help="Which files of the delta's folder, if it has several.")]
Dtype = Annotated[options.DtypeName | None, typer.Option(help="Type to save in. By default as the model is stored.")]


def merge(
    model: Model,
    delta: options.DeltaArgument,
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

    def add(unet: Any, weights: Any, base: Any) -> str:
        from ..delta.apply import NO_RECIPE
        from ..delta.merge import find_merged, merge_delta, merge_record

        if find_merged(unet, weights) is not None:
            raise ValueError(f"{delta} is merged into {model} already; take it out with perflow unmerge first.")
        before, new = merge_record(unet), merge_delta(unet, weights, scale, base=base)
        both = before is not None and NO_RECIPE not in (before.recipe, new.recipe)
        beside = f" beside {before.source}, whose recipe goes on to count" if before and both else ""
        return f"merged at scale {new.scale:g}{beside}"

    _rewrite(model, delta, out, variant, delta_variant, dtype, force, add)


def unmerge(
    model: Model,
    delta: options.DeltaArgument,
    out: Out,
    variant: Variant = None,
    delta_variant: DeltaVariant = None,
    dtype: Dtype = None,
    force: options.Force = False,
) -> None:
    """Write the UNet of MODEL with DELTA taken out again, at the scale it was merged with, but for a rounding."""

    def take_out(unet: Any, weights: Any, base: Any) -> str:
        from ..delta.merge import merge_records, unmerge_delta

        (record,) = unmerge_delta(unet, weights, exact=False)
        left = ", ".join(entry.source for entry in merge_records(unet))
        return (
            f"merged at scale {record.scale:g}, taken out{left and f'; {left} left in it'}. A saved UNet has lost the "
            "base's last bits: weights may differ from the base's by a rounding."
        )

    _rewrite(model, delta, out, variant, delta_variant, dtype, force, take_out)


def _rewrite(
    model: Path,
    delta: Path,
    out: Path,
    variant: str | None,
    delta_variant: str | None,
    dtype: options.DtypeName | None,
    force: bool,
    change: Callable[[Any, Any, Any], str],
) -> None:
    """Loads the UNet, has `change(unet, delta, base)` change it, writes it whole or not at all, and says what it did.

    The configuration of the UNet is checked first, and that its files hold all of it: diffusers fills gaps at random.
    """
    from .pipeline import holds_pipeline, quiet_libraries
    from .unets import empty_unet, read_config, require_unet

    folder = require_unet(model)
    options.require_free_directory("--out", out, force)
    quiet_libraries()
    from diffusers import UNet2DConditionModel

    from ..atomic_files import atomic_directory
    from ..delta.apply import QUANTIZED_REMEDY, require_architecture
    from ..delta.files import find_weights, open_weights, variants_of

    if "quantization_config" in read_config(folder):
        raise ValueError(f"model {folder} is quantized; {QUANTIZED_REMEDY}.")
    name = find_weights(folder, variant).name
    variant = variants_of([name])[name]
    written = _kept_variant(out, variant)
    weights, own = open_weights(delta, delta_variant), open_weights(folder, variant)
    for part in (own, weights):
        require_architecture(part, empty_unet(folder))
    stored = own.tensor(next(iter(own.shapes))).dtype
    console = Console(stderr=True)
    with console.status(f"loading {folder}"):
        unet = UNet2DConditionModel.from_pretrained(
            folder,
            variant=variant,
            dtype=stored if dtype is None else options.parse_dtype(dtype),
            use_safetensors=True,
            local_files_only=True,
        )
    with console.status(f"changing {model} by {delta.name}"):
        done = change(unet, weights, own)
    if (origin := read_config(folder).get("_name_or_path")) and not holds_pipeline(folder.absolute().parent):
        unet.register_to_config(_name_or_path=origin)  # which leads to its pipeline
    with console.status(f"writing {out}"), atomic_directory(out) as temporary:
        unet.save_pretrained(temporary, variant=written)
    typer.echo(f"{out}: {delta} {done}")


def _kept_variant(out: Path, variant: str | None) -> str | None:
    """The variant to save a UNet in: that of the model's weights where those replace files of it, else none.

    Raises:
        ValueError: the directory is not a UNet's, or holds other files too, which are never deleted.
    """
    from ..delta.files import listed, variants_of
    from .unets import CONFIG, is_unet

    names = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    if not names:
        return None
    if not is_unet(out):
        raise ValueError(
            f"--out {out} holds more than a UNet, and --force replaces nothing else; name another directory."
        )
    variants = variants_of(names)
    kept = variant if variant in variants.values() else None
    replaced = {CONFIG, *(name for name, own in variants.items() if own == kept)}
    if others := [name for name in names if name not in replaced]:
        raise ValueError(
            f"--out {out} holds {listed(others)} too, which --force does not delete; name another directory, or "
            "move them elsewhere."
        )
    return kept
