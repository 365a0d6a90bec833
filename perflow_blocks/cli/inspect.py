"""`perflow inspect`: what a file or folder of weights is."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from ..delta.recipe import DeltaRecipe


def inspect(
    path: Annotated[Path, typer.Argument(exists=True, help="A delta, a LoRA, or a UNet's or pipeline's folder.")],
    base: Annotated[Path | None, options.path("Weights of a delta's base, to compare its layers with.")] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest tensors to name.")] = 5,
    variant: options.Variant = None,
    base_variant: options.BaseVariant = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what PATH holds: delta, LoRA or UNet, its recipe, tensors by kind, norms, and what is merged into it."""
    from ..delta.apply import PARTIAL_KEY
    from ..delta.files import holds_differences, is_lora, open_weights, read_recipe
    from ..delta.merge import saved_records
    from ..delta.summary import TensorSummary, summarize
    from .unets import find_unet, read_config

    weights = open_weights(path, variant)
    tensors = summarize(weights, None if base is None else open_weights(base, base_variant))
    folder = find_unet(path)
    where = "" if folder is None else "UNet folder, " if folder == path else "directory with a UNet, "
    # Where no normalization layer tells, it may be either.
    unknown = "delta" if PARTIAL_KEY in weights.metadata else "delta or weights"
    kind = {None: unknown, True: "delta", False: "weights"}[holds_differences(weights)]
    # The factors that multiply the input have the rank as their first dimension in every layout.
    downs = (".lora_A.", ".lora_down.", ".lora.down.")
    kinds = dict[str, list[TensorSummary]]()
    for tensor in tensors:
        kinds.setdefault(tensor.kind, []).append(tensor)
    largest = sorted(tensors, key=lambda tensor: -tensor.size)[:top]
    found: dict[str, Any] = {
        "path": str(path),
        "what": where + ("LoRA" if is_lora(weights.shapes) else kind),
        "tensors": len(tensors),
        "numbers": sum(tensor.numbers for tensor in tensors),
        "dtypes": [dtype for dtype, _ in Counter(tensor.dtype for tensor in tensors).most_common()],
        "bytes": sum(tensor.bytes for tensor in tensors),
        "norm": _root(sum(tensor.squares for tensor in tensors)),
        "not_finite": [tensor.name for tensor in tensors if not math.isfinite(tensor.squares)],
        "recipe": _settings(read_recipe(weights)),
        "merged": [
            {"source": record.source, "scale": record.scale, "digest": record.digest}
            | {"recipe": _settings(record.recipe)}
            for record in (saved_records(read_config(folder)) if folder else ())
        ],
        "ranks": [shape[0] for name, shape in weights.shapes.items() if any(part in name for part in downs)],
        "kinds": {
            name: {"tensors": len(own), "numbers": (numbers := sum(one.numbers for one in own))}
            | {"root_mean_square": _root(sum(one.squares for one in own) / max(1, numbers))}
            for name, own in sorted(kinds.items(), key=lambda item: -sum(one.numbers for one in item[1]))
        },
        "largest": {tensor.name: tensor.size if math.isfinite(tensor.size) else None for tensor in largest},
    }
    typer.echo(json.dumps(found) if as_json else _text(found, relative=base is not None))


def _text(found: Mapping[str, Any], *, relative: bool) -> str:
    """What `inspect` found, in lines and tables."""
    ranks, bad = found["ranks"], found["not_finite"]
    heading = "norm over the base's" if relative else "root mean square"
    lines = [
        f"{found['path']}: {found['what']}",
        f"{found['tensors']} tensors, {found['numbers']:,} numbers, {', '.join(found['dtypes'])}, "
        f"{found['bytes'] / 1e6:,.1f} MB",
        f"norm: {_number(found['norm'], 6)}",
        *([f"{len(bad)} tensors are NOT FINITE, {bad[0]} first"] if bad else []),
        *([] if found["merged"] else [f"recipe: {_listed(found['recipe'])}"]),
        *(
            f"merged: {one['source']} at scale {one['scale']:g}, digest {one['digest'][:12] or 'unknown'}, recipe: "
            f"{_listed(one['recipe'])}"
            for one in found["merged"]
        ),
        *([f"layers: {len(ranks)}, rank {min(ranks)} to {max(ranks)}"] if ranks else []),
    ]
    rows = [
        (name, one["tensors"], f"{one['numbers']:,}", _number(one["root_mean_square"]))
        for name, one in found["kinds"].items()
    ]
    lines += ["", options.table(("kind", "tensors", "numbers", "root mean square"), *rows)]
    if largest := [(name, _number(size)) for name, size in found["largest"].items()]:
        lines += ["", options.table(("largest tensors", heading), *largest)]
    return "\n".join(lines)


def _settings(recipe: DeltaRecipe) -> dict[str, Any]:
    return {name: value for name, value in asdict(recipe).items() if value is not None}


def _listed(recipe: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in recipe.items()) or "none"


def _root(mean: float) -> float | None:
    """The square root; None, which JSON can hold, for what is not finite."""
    return math.sqrt(mean) if math.isfinite(mean) else None


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"
