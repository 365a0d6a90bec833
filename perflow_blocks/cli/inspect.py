"""`perflow inspect`: what a file or folder of weights is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from torch import Tensor

    from ..delta.files import Weights

KINDS = {
    "norm": "normalization",
    "attn2.": "cross-attention",
    "attn1.": "self-attention",
    ".ff.": "feed-forward",
    "embedding.": "embedding of time and size",
    "time_emb_proj.": "embedding of time and size",
    "conv": "convolution",
}
"""Kinds of layer by a part of their names; the first that fits counts."""


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a file."""

    name: str
    kind: str  # of layer
    dtype: str
    numbers: int
    bytes: int
    squares: float  # their sum, NaN or infinite where a value is
    size: float  # norm over that of the base's tensor, or without a base the root mean square


def inspect(
    path: Annotated[Path, typer.Argument(exists=True, help="A delta, a LoRA, or a UNet's or pipeline's folder.")],
    base: Annotated[
        Path | None, typer.Option(exists=True, help="Weights of a delta's base, to compare its layers with.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest tensors to name.")] = 5,
    variant: options.Variant = None,
    base_variant: options.BaseVariant = None,
) -> None:
    """Say what PATH holds: delta, LoRA or UNet, its recipe, tensors by kind, norms, and what is merged into it."""
    from ..delta.files import holds_differences, is_lora, open_weights, read_recipe
    from ..delta.merge import saved_records
    from .unets import find_unet, read_config

    weights = open_weights(path, variant)
    recipe = {name: value for name, value in asdict(read_recipe(weights)).items() if value is not None}
    own = None if base is None else open_weights(base, base_variant)
    tensors = summarize(weights, own)
    folder = find_unet(path)
    where = "" if folder is None else "UNet folder, " if folder == path else "directory with a UNet, "
    # Where no normalization layer tells, it may be either.
    kind = {None: "delta or weights", True: "delta", False: "weights"}[holds_differences(weights)]
    typer.echo(f"{path}: {where}{'LoRA' if is_lora(weights.shapes) else kind}")
    dtypes = ", ".join(dtype for dtype, _ in Counter(tensor.dtype for tensor in tensors).most_common())
    numbers, size = sum(tensor.numbers for tensor in tensors), sum(tensor.bytes for tensor in tensors) / 1e6
    typer.echo(f"{len(tensors)} tensors, {numbers:,} numbers, {dtypes}, {size:,.1f} MB")
    typer.echo(f"norm: {math.sqrt(sum(tensor.squares for tensor in tensors)):.6g}")
    if bad := [tensor.name for tensor in tensors if not math.isfinite(tensor.squares)]:
        typer.echo(f"{len(bad)} tensors are NOT FINITE, {bad[0]} first")
    typer.echo(f"recipe: {', '.join(f'{name}={value}' for name, value in recipe.items()) or 'none'}")
    for record in saved_records(read_config(folder)) if folder else ():
        digest = record.digest[:12] or "unknown"
        typer.echo(f"merged: {record.source} at scale {record.scale:g}, digest {digest}")
    # The factors that multiply the input have the rank as their first dimension in every layout.
    downs = (".lora_A.", ".lora_down.", ".lora.down.")
    if ranks := [shape[0] for name, shape in weights.shapes.items() if any(part in name for part in downs)]:
        typer.echo(f"layers: {len(ranks)}, rank {min(ranks)} to {max(ranks)}")
    totals = Counter[str]()
    for tensor in tensors:
        totals[tensor.kind] += tensor.numbers
    typer.echo(f"\n{'kind':<28}  {'tensors':>7}  {'numbers':>15}  {'root mean square':>16}")
    for kind, numbers in totals.most_common():
        squares = [tensor.squares for tensor in tensors if tensor.kind == kind]
        mean = math.sqrt(sum(squares) / numbers) if numbers else 0.0
        typer.echo(f"{kind:<28}  {len(squares):>7}  {numbers:>15,}  {mean:>16.3g}")
    if top:
        heading = "norm over the base's" if base is not None else "root mean square"
        typer.echo(f"\n{'largest tensors':<80}  {heading:>20}")
        for tensor in sorted(tensors, key=lambda tensor: -tensor.size)[:top]:
            typer.echo(f"{tensor.name:<80}  {tensor.size:>20.3g}")


def summarize(weights: Weights, base: Weights | None) -> list[TensorSummary]:
    """Reads every tensor once; sizes are relative to `base`."""
    from diffusers.utils import logging

    if base is not None:
        missing = [name for name in weights.shapes if name not in base.shapes]
        if missing:
            raise ValueError(f"{base.label} has no {missing[0]}; pass the base that {weights.label} was taken from.")
    tensors = []
    for name in logging.tqdm(weights.shapes, desc="read", unit="tensor"):
        tensor = weights.tensor(name)
        squares = _squares(tensor)
        whole = tensor.numel() if base is None else _squares(base.tensor(name))
        size = math.sqrt(squares / whole) if whole else math.inf if squares else 0.0
        dtype, by_shape = str(tensor.dtype).removeprefix("torch."), {4: "convolution", 2: "linear"}
        kind = next((kind for part, kind in KINDS.items() if part in name), by_shape.get(tensor.dim(), "other"))
        tensors.append(TensorSummary(name, kind, dtype, tensor.numel(), tensor.nbytes, squares, size))
    return tensors


def _squares(tensor: Tensor) -> float:
    """The sum of the squares, in float64, a part of the rows at a time."""
    from ..delta.files import row_chunks, rows_of

    parts = (rows_of(tensor, start, stop) for start, stop in row_chunks(tensor.shape))
    return sum(float(part.double().square().sum()) for part in parts)
