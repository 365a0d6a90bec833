"""`perflow inspect`: what a file or folder of weights is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .tables import aligned

if TYPE_CHECKING:
    from torch import Tensor

    from ..delta.files import Weights
    from ..delta.recipe import DeltaRecipe

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


@dataclass(frozen=True, kw_only=True)
class TensorSummary:
    """One tensor of a file."""

    name: str
    kind: str  # of layer
    dtype: str
    parameters: int
    bytes: int
    squared_norm: float  # NaN or infinite where a value is
    size: float  # norm over that of the base's tensor, or without a base the root mean square


def inspect(
    path: Annotated[Path, typer.Argument(help="A delta, a LoRA, or a UNet's or pipeline's folder.")],
    base: Annotated[Path | None, typer.Option(help="Weights of a delta's base, to compare its layers with.")] = None,
    top: Annotated[int, typer.Option(help="How many of the largest tensors to name.")] = 5,
    variant: Annotated[str | None, typer.Option(help="Which files of PATH's folder, for example fp16.")] = None,
    base_variant: Annotated[str | None, typer.Option(help="Which files of the base's folder.")] = None,
) -> None:
    """Say what PATH holds: delta, LoRA or UNet, its recipe, tensors by kind, norms, and what is merged into it."""
    if top < 0:
        raise ValueError(f"--top {top} must be 0 or more, the number of tensors to name.")
    options.require_weights("path", path)
    if base is not None:
        options.require_weights("base", base)
    from ..delta.files import open_weights, read_recipe

    weights = open_weights(path, variant)
    recipe = read_recipe(weights)
    records = _merged(path)
    own = None if base is None else open_weights(base, base_variant)
    tensors = summarize(weights, own)
    what = what_weights_are(weights)
    lines = [f"{path}: {_folder_kind(path)}{what}", *_totals(tensors), _recipe_line(recipe)]
    lines += records
    if what == "LoRA":
        lines.append(_ranks(weights))
    lines += ["", *_kind_table(tensors)]
    if top:
        heading = "norm over the base's" if base is not None else "root mean square"
        largest = sorted(tensors, key=lambda tensor: -tensor.size)[:top]
        rows = [["largest tensors", heading], *([tensor.name, f"{tensor.size:.3g}"] for tensor in largest)]
        lines += ["", *aligned(rows)]
    typer.echo("\n".join(lines))


def summarize(weights: Weights, base: Weights | None = None) -> list[TensorSummary]:
    """Reads every tensor once; sizes are relative to `base`."""
    from diffusers.utils import logging

    if base is not None:
        missing = [name for name in weights.shapes if name not in base.shapes]
        if missing:
            raise ValueError(f"{base.label} has no {missing[0]}; pass the base that {weights.label} was taken from.")
    tensors = []
    for name in logging.tqdm(weights.shapes, desc="read", unit="tensor"):
        tensor = weights.tensor(name)
        squares = _squared_norm(tensor)
        whole = tensor.numel() if base is None else _squared_norm(base.tensor(name))
        tensors.append(
            TensorSummary(
                name=name,
                kind=kind_of(name, tuple(tensor.shape)),
                dtype=str(tensor.dtype).removeprefix("torch."),
                parameters=tensor.numel(),
                bytes=tensor.nbytes,
                squared_norm=squares,
                size=math.sqrt(squares / whole) if whole else math.inf if squares else 0.0,
            )
        )
    return tensors


def what_weights_are(weights: Weights) -> str:
    """ "LoRA", "delta", "weights" (of a model), or "delta or weights" where no normalization layer tells."""
    from ..delta.files import holds_differences, is_lora

    if is_lora(weights.shapes):
        return "LoRA"
    kinds = {None: "delta or weights", True: "delta", False: "weights"}
    return kinds[holds_differences(weights)]


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """The kind of layer, by the names that diffusers gives in a UNet, else by the number of dimensions."""
    known = next((kind for part, kind in KINDS.items() if part in name), None)
    return known or ("convolution" if len(shape) == 4 else "linear" if len(shape) == 2 else "other")


def _squared_norm(tensor: Tensor) -> float:
    """In float64, a part of the rows at a time."""
    from ..delta.files import row_chunks, rows_of

    parts = (rows_of(tensor, start, stop) for start, stop in row_chunks(tensor.shape))
    return sum(float(part.double().square().sum()) for part in parts)


def _folder_kind(path: Path) -> str:
    from .unets import find_unet

    folder = find_unet(path) if path.is_dir() else None
    return "" if folder is None else "UNet folder, " if folder == path else "directory with a UNet, "


def _totals(tensors: list[TensorSummary]) -> list[str]:
    numbers, size = sum(tensor.parameters for tensor in tensors), sum(tensor.bytes for tensor in tensors) / 1e6
    dtypes = ", ".join(dtype for dtype, _ in Counter(tensor.dtype for tensor in tensors).most_common())
    norm = math.sqrt(sum(tensor.squared_norm for tensor in tensors))
    bad = [tensor.name for tensor in tensors if not math.isfinite(tensor.squared_norm)]
    lines = [f"{len(tensors)} tensors, {numbers:,} numbers, {dtypes}, {size:,.1f} MB", f"norm: {norm:.6g}"]
    return [*lines, f"{len(bad)} tensors are NOT FINITE, {bad[0]} first"] if bad else lines


def _recipe_line(recipe: DeltaRecipe) -> str:
    given = [f"{name}={value}" for name, value in asdict(recipe).items() if value is not None]
    return f"recipe: {', '.join(given) or 'none'}"


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
    return f"layers: {len(ranks)}, rank {min(ranks)} to {max(ranks)}" if ranks else "ranks: none that are known"


def _kind_table(tensors: list[TensorSummary]) -> list[str]:
    """Number of tensors and values by kind, the kind with most values first."""
    count, numbers, squares = Counter[str](), Counter[str](), dict[str, float]()
    for tensor in tensors:
        count[tensor.kind] += 1
        numbers[tensor.kind] += tensor.parameters
        squares[tensor.kind] = squares.get(tensor.kind, 0.0) + tensor.squared_norm
    rows = [["kind", "tensors", "numbers", "root mean square"]]
    for kind, total in numbers.most_common():
        mean = (squares[kind] / total) ** 0.5 if total else 0.0
        rows.append([kind, str(count[kind]), f"{total:,}", f"{mean:.3g}"])
    return aligned(rows)
