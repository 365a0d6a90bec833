"""Making deltas: dW = W_student - W_base of two models or checkpoints, and files of it with the sampling recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..atomic_files import atomic_path
from . import files
from .apply import PARTIAL_KEY, architecture_of
from .recipe import ARCHITECTURE_KEY, DeltaRecipe

_TYPES = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")


def extract_delta(
    student: nn.Module | Mapping[str, Tensor], base: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """dW of two models of one architecture, each a module or its state dict: float32 by state-dict key.

    Integer buffers are not part of a delta. Added to the base in float32, the difference gives the student's very bits
    where both are within a factor of 2 of each other (Sterbenz' lemma), as almost all weights of a fine-tune are;
    elsewhere it is off by at most one unit in the last place of the larger.

    Raises:
        ValueError: the two differ in keys or shapes, or hold weights without values ("meta" device).
    """
    difference = files.DifferenceWeights(
        files.MappingWeights(files.floating_entries(student), "the student"),
        files.MappingWeights(files.floating_entries(base), "the base"),
    )
    if empty := [n for n in difference.shapes if any(part.tensor(n).is_meta for part in difference.sources)]:
        raise ValueError(f"{files.listed(empty)} hold no values (device 'meta'); load both models before extracting.")
    return {name: difference.tensor(name) for name in difference.shapes}


def open_difference(student: files.Delta, base: files.Delta, config: Mapping[str, Any] | None = None) -> files.Weights:
    """The delta `student - base` of two checkpoints, for a student that was published merged.

    It is formed tensor by tensor as it is read. Original Latent Diffusion names need the UNet's `config`.

    Raises:
        ValueError: a checkpoint cannot be read or is a delta itself, or the two do not match.
    """
    first, second = files.named_alike(files.opened(student), files.opened(base), config or {})
    difference = files.DifferenceWeights(first, second)
    for name, weights in (("student", first), ("base", second)):
        mean = files.mean_norm_scale(weights)
        if mean is not None and abs(mean) < 0.1:  # about 1 in a trained model
            raise ValueError(f"the {name} {weights.label} holds differences, as a delta does; pass a model's weights.")
    return difference


def header_bytes(entries: Mapping[str, Any]) -> bytes:
    """The start of a safetensors file (https://huggingface.co/docs/safetensors), before the values.

    That is the header's length in 8 bytes, little endian, and the header in JSON, its keys in the order given. The
    library writes the metadata in random order.
    """
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # readers map the values, which must be aligned
    return len(header).to_bytes(8, "little") + header


def save_delta(
    delta: files.Delta,
    path: str | os.PathLike[str],
    recipe: DeltaRecipe | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    partial: bool = False,
    base: nn.Module | None = None,
    progress: bool = False,
) -> None:
    """Writes a delta file, one tensor at a time; it appears complete or not at all.

    The library's own writer needs all tensors in memory.

    Args:
        delta: what `extract_delta` or `open_difference` gave.
        path: of the file; missing directories are made.
        recipe: how the delta is to be sampled.
        dtype: the floating-point type to store.
        partial: a merge leaves weights that the delta does not name as they are; otherwise their absence is an error.
        base: the model the delta was taken from: the file then records its architecture, which a merge checks.
        progress: shows diffusers' progress bar.

    Raises:
        ValueError: nothing to save, a type that cannot be stored, values that are not finite in it, a difference of
            equal models, or a path that cannot be written.
    """
    kind = str(dtype).removeprefix("torch.")
    if kind not in _TYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(_TYPES)}.")
    code = kind.replace("float", "F").upper().removesuffix("FN")  # as safetensors calls it: F8_E4M3, F16, BF16
    weights = files.opened(delta)
    metadata = {"format": "pt", **(recipe or DeltaRecipe()).to_metadata()}
    if partial:
        metadata[PARTIAL_KEY] = "true"
    if base is not None:
        metadata[ARCHITECTURE_KEY] = architecture_of(base)
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, shape in weights.shapes.items():
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    changed = not isinstance(weights, files.DifferenceWeights)
    names = logging.tqdm(weights.shapes, desc="write weights", unit="tensor") if progress else weights.shapes
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            file.write(header_bytes(entries))
            for name in names:
                stored = weights.tensor(name).detach().to("cpu", dtype).contiguous()
                file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
                if not files.is_finite(stored):
                    raise ValueError(
                        f"{weights.label} is not finite as {dtype} ({name}); check the weights, or pass "
                        "dtype=torch.float32."
                    )
                changed = changed or bool(stored.any())
                del stored  # so that one tensor at a time is in memory
        if not changed:
            raise ValueError(f"{weights.label} is zero in every weight; pass two models that differ.")
        weights.require_unchanged()
