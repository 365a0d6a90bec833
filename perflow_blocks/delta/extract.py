"""Making deltas: dW = W_student - W_base of two models or checkpoints, and files of it with the sampling recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..atomic_files import atomic_path
from . import files
from .apply import PARTIAL_KEY
from .recipe import DeltaRecipe


def extract_delta(
    student: nn.Module | Mapping[str, Tensor], base: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """dW of two models of one architecture, each a module or its state dict: float32 by state-dict key.

    Integer buffers are not part of a delta. Added to the base in float32, the difference gives the student's very bits
    where both are within a factor of 2 of each other (Sterbenz' lemma), as almost all weights of a fine-tune are;
    elsewhere it is off by at most one unit in the last place of the larger.

    Raises:
        ValueError: the two differ in keys or shapes.
    """
    difference = files.opened(student).minus(files.opened(base))
    return {name: difference.tensor(name) for name in difference.shapes}


def open_difference(student: files.Delta, base: files.Delta) -> files.Weights:
    """The delta `student - base` of two checkpoints, for a student that was published merged.

    It is formed tensor by tensor as it is read.

    Raises:
        ValueError: a checkpoint cannot be read or is a delta itself, or the two do not match.
    """
    pair = {"student": files.opened(student), "base": files.opened(base)}
    difference = pair["student"].minus(pair["base"])
    for what, weights in pair.items():
        if files.holds_differences(weights):
            raise ValueError(f"the {what} {weights.label} holds differences, as a delta does; pass a model's weights.")
    return difference


def changed_weights(difference: files.Weights) -> files.Weights:
    """Without the tensors that are zero; all of them where nothing else is there. Save it as `partial`."""
    names = logging.tqdm(difference.shapes, desc="compare weights", unit="tensor")
    changed = {name: difference.shapes[name] for name in names if difference.tensor(name).any()}
    return replace(difference, shapes=changed or difference.shapes)


def save_delta(
    delta: files.Delta,
    path: str | os.PathLike[str],
    recipe: DeltaRecipe | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    partial: bool = False,
    progress: bool = False,
) -> None:
    """Writes a delta file, one tensor at a time; it appears complete or not at all.

    Args:
        delta: what `extract_delta` or `open_difference` gave.
        path: of the file; missing directories are made.
        recipe: how the delta is to be sampled.
        dtype: the floating-point type to store.
        partial: a merge leaves weights that the delta does not name as they are; otherwise their absence is an error.
        progress: shows diffusers' progress bar.

    Raises:
        ValueError: nothing to save, a type that cannot be stored, values that are not finite in it, a difference of
            equal models, or a path that cannot be written.
    """
    if dtype not in files.DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(map(str, files.DTYPES))}.")
    weights = files.opened(delta)
    kept = {name: text for name, text in weights.metadata.items() if name == files.THETA}  # of a file's mapping
    metadata = kept | (recipe or DeltaRecipe()).to_metadata() | ({PARTIAL_KEY: "true"} if partial else {})
    theta = torch.tensor(json.loads(metadata.pop(files.THETA, "[]")), dtype=torch.float64)
    changed = weights.base is None

    def stored(name: str) -> Tensor:
        nonlocal changed
        if name == files.THETA:
            return theta
        tensor = weights.tensor(name).to("cpu", dtype)
        if not files.is_finite(tensor):
            raise ValueError(
                f"{weights.label} is not finite as {dtype} ({name}); check the weights, or pass dtype=torch.float32."
            )
        changed = changed or bool(tensor.any())
        return tensor

    with atomic_path(path) as temporary:
        types = {name: (dtype, shape) for name, shape in weights.shapes.items()}
        if len(theta):
            types[files.THETA] = (torch.float64, tuple(theta.shape))
        write_tensors(temporary, types, stored, metadata, progress=progress)
        if not changed:
            raise ValueError(f"{weights.label} is zero in every weight; pass two models that differ.")
        weights.require_unchanged()


def write_tensors(
    path: Path,
    types: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    progress: bool = False,
) -> None:
    """Writes a safetensors file (https://huggingface.co/docs/safetensors) of tensors with these types and shapes.

    It starts with the header's length in 8 bytes, little endian, and the header in JSON. The library's own writer
    needs all tensors in memory, and its metadata come in random order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name, (dtype, shape) in types.items():
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": files.DTYPES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the values, which must be aligned
    names = logging.tqdm(types, desc="write weights", unit="tensor") if progress else types
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
