"""`perflow inspect`: what a file or folder of weights is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .tables import aligned

if TYPE_CHECKING:
    from ..delta.files import Weights
    from ..delta.recipe import DeltaRecipe
    from ..delta.summary import WeightSummary


def inspect(
    path: Annotated[Path, typer.Argument(help="A delta, a LoRA, or a UNet's or pipeline's folder.")],
    base: Annotated[Path | None, typer.Option(help="Weights of a delta's base, to compare its layers with.")] = None,
    top: Annotated[int, typer.Option(help="How many of the largest tensors to name.")] = 5,
    variant: Annotated[str | None, typer.Option(help="Which files of PATH's folder, fp16 say.")] = None,
    base_variant: Annotated[str | None, typer.Option(help="Which files of the base's folder.")] = None,
    allow_pickle: options.AllowPickle = False,
    config: options.Config = None,
) -> None:
    """Say what PATH holds: delta, LoRA or UNet, its recipe, tensors by kind, norms, and what is merged into it."""
    if top < 0:
        raise ValueError(f"--top {top} is below 0; pass how many tensors to name.")
    options.require_weights("path", path)
    if base is not None:
        options.require_weights("base", base)
    from ..delta.files import open_weights, read_recipe
    from ..delta.recipe import ARCHITECTURE_KEY
    from ..delta.summary import summarise
    from .unets import find_config

    weights = open_weights(path, variant, allow_pickle=allow_pickle)
    recipe = read_recipe(weights)
    records = _merged(path)
    own = None if base is None else open_weights(base, base_variant, allow_pickle=allow_pickle)
    unet = None if base is None else find_config(config, base, path)
    summary = summarise(weights, own, None if unet is None else unet.config)
    lines = [f"{path}: {_what(path, summary)}", *_totals(summary)]
    lines += _recipe_lines(recipe)
    if architecture := weights.metadata.get(ARCHITECTURE_KEY):
        lines.append(f"architecture: {architecture[:12]}")
    lines += records
    if summary.what == "LoRA":
        lines.append(_ranks(weights))
    lines += ["", *_kind_table(summary)]
    if top:
        lines += ["", *_largest_table(summary, top, relative=base is not None)]
    typer.echo("\n".join(lines))


def _what(path: Path, summary: WeightSummary) -> str:
    from .unets import find_unet

    folder = find_unet(path) if path.is_dir() else None
    if folder is None:
        return summary.what
    return f"UNet folder, {summary.what}" if folder == path else f"directory with a UNet, {summary.what}"


def _totals(summary: WeightSummary) -> list[str]:
    numbers = sum(tensor.parameters for tensor in summary.tensors)
    size = sum(tensor.bytes for tensor in summary.tensors) / 1e6
    lines = [f"{len(summary.tensors)} tensors, {numbers:,} numbers, {summary.dtypes}, {size:,.1f} MB"]
    lines.append(f"norm: {summary.norm:.6g}")
    if summary.not_finite:
        lines.append(f"{len(summary.not_finite)} tensors are NOT FINITE, {summary.not_finite[0]} first")
    return lines


def _recipe_lines(recipe: DeltaRecipe) -> list[str]:
    given = {name: value for name, value in asdict(recipe).items() if value is not None}
    return ["recipe: " + ", ".join(f"{name}={value}" for name, value in given.items())] if given else ["recipe: none"]


def _merged(path: Path) -> list[str]:
    """What a folder's configuration says is merged."""
    from ..delta.merge import saved_records
    from .unets import find_unet, read_config

    folder = find_unet(path)
    records = [] if folder is None else saved_records(read_config(folder))
    return [f"merged: {r.source} at scale {r.scale:g}, digest {r.digest[:12] or 'unknown'}" for r in records]


def _ranks(weights: Weights) -> str:
    """The span of ranks, by the factors that multiply the input, whose first dimension it is in every layout."""
    downs = (".lora_A.", ".lora_down.", ".lora.down.")
    ranks = [shape[0] for name, shape in weights.shapes.items() if any(part in name for part in downs)]
    if not ranks:
        return "ranks: none that are known"
    return f"layers: {len(ranks)}, rank {min(ranks)} to {max(ranks)}"


def _kind_table(summary: WeightSummary) -> list[str]:
    rows = [["kind", "tensors", "numbers", "root mean square"]]
    for kind, tensors in summary.kinds().items():
        numbers = sum(tensor.parameters for tensor in tensors)
        square = sum(tensor.squared_norm for tensor in tensors)
        mean = (square / numbers) ** 0.5 if numbers else 0.0
        rows.append([kind, str(len(tensors)), f"{numbers:,}", f"{mean:.3g}"])
    return aligned(rows)


def _largest_table(summary: WeightSummary, count: int, *, relative: bool) -> list[str]:
    rows = [["largest tensors", "norm over the base's" if relative else "root mean square"]]
    return aligned([*rows, *([tensor.name, f"{tensor.size:.3g}"] for tensor in summary.largest(count))])
