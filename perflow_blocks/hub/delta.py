"""Which delta an exported workflow merges: none, a copy of the file in it, or one that its weights hold already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..blocks.merge_delta import delta_path
from ..blocks.saving import DELTA_FILE
from ..blocks.settings import python_number
from ..builder.problems import Problems
from ..delta.files import open_weights, read_recipe
from ..delta.merge import MergeRecord, find_merged, merge_record, merge_records
from ..delta.recipe import DeltaRecipe
from .entries import WeightsMode


def choose_delta(
    pipe: Any, blocks: Any, weights: WeightsMode, given: str | os.PathLike[str] | None, problems: Problems
) -> Path | None:
    """The file to copy, or None where the repository needs none; what is merged and cannot be kept is a problem."""
    declared = {spec.name: spec.default for spec in blocks.expected_configs}
    configured = pipe.config.get("delta") if "delta" in declared else None
    if configured == declared.get("delta"):
        configured = None  # the blocks name it by themselves
    records = _records(pipe)
    if configured is not None and Path(str(configured)).name in {r.source for r in records if r.reloaded}:
        configured = None  # the weights were saved with it
    merged = [record for record in records if not record.reloaded]
    names = [record.source for record in merged] or ([str(configured)] if configured else [])
    if weights == "reference":
        if names or given is not None:
            problems.add(
                f"the delta {Path(str(given or names[0])).name} is not part of the weights that are referred to; pass "
                "weights='delta-only' to copy it, or 'include' to save the merged weights."
            )
        return None
    if weights == "include" and merged:
        if given is not None:
            problems.add(f"{Path(names[0]).name} is merged into the UNet that is included; leave out delta=.")
        return None
    if given is None and not names:
        if weights == "delta-only":
            problems.add("weights='delta-only' needs a delta, and the pipeline has none; pass delta= with its file.")
        return None
    if "delta" not in declared:
        problems.add("the blocks merge no delta; insert a PeRFlowMergeDeltaStep, or pass weights='include'.")
        return None
    path = None
    with problems.noted():
        path = _file(pipe, merged, given)
    return path


def delta_settings(pipe: Any) -> dict[str, Any]:
    """The configuration values for a delta that is copied."""
    scales = [record.scale for record in _records(pipe) if not record.reloaded]
    scale = scales[0] if scales else pipe.config.get("delta_scale", 1.0)
    return {"delta": DELTA_FILE, "delta_scale": python_number(scale)}


def recipe_of(pipe: Any, path: Path | None) -> DeltaRecipe:
    """How the weights of the export were distilled, as far as the delta `path`, or one of the blocks' own, says it."""
    if path is None and os.path.isabs(pipe.config.get("delta") or ""):
        path = delta_path(None, pipe)
    if path is not None:
        return read_recipe(path)
    unet = getattr(pipe, "unet", None)
    record = None if unet is None else merge_record(unet)
    return DeltaRecipe() if record is None else record.recipe


def _records(pipe: Any) -> tuple[MergeRecord, ...]:
    unet = getattr(pipe, "unet", None)
    return () if unet is None else merge_records(unet)


def _file(pipe: Any, merged: list[MergeRecord], given: str | os.PathLike[str] | None) -> Path:
    """The delta's file, which a configuration can name: one alone, at one scale, of one file.

    Raises:
        ValueError: it is none of this, or no longer the one that is merged.
    """
    if len(merged) > 1:
        raise ValueError(
            f"{len(merged)} deltas are merged ({', '.join(Path(record.source).name for record in merged)}), of which "
            "an index can name one; pass weights='include'."
        )
    for record in merged:
        if record.scales:
            raise ValueError(
                f"{Path(record.source).name} is merged at scales of its own for some weights, which no index keeps; "
                "pass weights='include'."
            )
    if given is not None:
        path = Path(given).expanduser()
    else:
        path = Path(merged[0].source) if merged else delta_path(None, pipe) or Path()
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"delta {path} is no .safetensors file; pass delta= with one, which perflow extract writes.")
    weights = open_weights(path)
    read_recipe(weights)
    if merged and find_merged(pipe.unet, weights) is None:
        raise ValueError(f"{path} is not the delta that is merged into the UNet; pass that one as delta=.")
    return path
