"""Making deltas: dW = W_student - W_base of two models or checkpoints, and files of it with the sampling recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from .apply import (
    PARTIAL_KEY,
    Applied,
    Term,
    architecture_of,
    fit_delta,
    require_difference,
    require_finite,
)
from .atomic import atomic_path
from .files import (
    Delta,
    DifferenceWeights,
    MappingWeights,
    Weights,
    describe_mismatch,
    floating_entries,
    is_finite,
    listed,
    named_alike,
    open_weights,
    opened,
    read_recipe,
    subtract,
)
from .merge import uncompiled
from .recipe import ARCHITECTURE_KEY, DeltaRecipe
from .summary import DIFFERENCE_NORM, mean_norm_scale

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_NAMES |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


def extract_delta(
    student: nn.Module | Mapping[str, Tensor], base: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """dW of two models of one architecture, each a module or its state dict: float32 by state-dict key.

    Integer buffers are not part of a delta. Shapes are those of the weights. Added to the base in float32, the
    difference gives the student's very bits where both are within a factor of 2 of each other (Sterbenz' lemma), as
    almost all weights of a fine-tune are; elsewhere it is off by at most one unit in the last place of the larger.

    Raises:
        ValueError: the two differ in keys or shapes, or hold weights without values ("meta" device).
    """
    entries = floating_entries(student), floating_entries(base)
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in entries]
    mismatch = describe_mismatch(*shapes, given="the student", expected="the base")
    if mismatch:
        raise ValueError(f"student and base do not match: {mismatch}. Pass two models of the same architecture.")
    empty = [name for part in entries for name, tensor in part.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"{listed(empty)} hold no values (device 'meta'); load both models before extracting.")
    return {name: subtract(tensor, entries[1][name]) for name, tensor in entries[0].items()}


def open_difference(
    student: str | os.PathLike[str] | Weights,
    base: str | os.PathLike[str] | Weights,
    config: Mapping[str, Any] | None = None,
) -> Weights:
    """The delta `student - base` of two checkpoints, for a student that was published merged.

    It is formed tensor by tensor as it is read; both checkpoints stay memory-mapped. They may be named differently:
    for an original Latent Diffusion one `config` is the configuration of the UNet.

    Raises:
        ValueError: a checkpoint cannot be read or is a delta itself, or the two do not match.
    """
    first, second = named_alike(opened(student), opened(base), config or {})
    difference = DifferenceWeights(first, second)
    for name, weights in (("student", first), ("base", second)):
        mean = mean_norm_scale(weights)
        if mean is not None and abs(mean) < DIFFERENCE_NORM:
            raise ValueError(f"the {name} {weights.label} holds differences, as a delta does; pass a model's weights.")
    return difference


def save_delta(
    delta: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    recipe: DeltaRecipe | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    partial: bool = False,
    base: nn.Module | None = None,
) -> None:
    """Writes a delta file; it appears complete or not at all.

    `partial` says that weights the delta does not name are meant to stay as they are; otherwise a merge takes their
    absence for an error. From `base`, the model the delta was taken from, the file gets the architecture that it fits,
    which is checked when it is merged, also for a partial one.

    Raises:
        ValueError: nothing to save, values that are not finite (in `dtype`), or a path that cannot be written.
    """
    if not delta:
        raise ValueError("the delta holds no tensors; pass what extract_delta returned.")
    metadata = {"format": "pt", **(recipe or DeltaRecipe()).to_metadata()}
    if partial:
        metadata[PARTIAL_KEY] = "true"
    if base is not None:
        metadata[ARCHITECTURE_KEY] = architecture_of(base)
    write_weights(MappingWeights(delta, "the delta"), path, dtype, metadata)


def write_weights(
    weights: Weights,
    path: str | os.PathLike[str],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    *,
    progress: bool = False,
) -> None:
    """Writes all tensors as `dtype` into a safetensors file, one at a time; it appears complete or not at all.

    The library's own writer wants all tensors in memory. The format
    (https://huggingface.co/docs/safetensors/index#format): the header's length in 8 bytes, little endian, the header
    in JSON, and the values of all tensors one after another.

    With `progress` diffusers' progress bar shows the tensors.

    Raises:
        ValueError: a `dtype` that is not a floating-point type, values that are not finite in it, a difference of
            equal models, or a path that cannot be written.
    """
    if dtype not in _NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _NAMES)
        raise ValueError(f"dtype={dtype} must be one of {known}.")
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, shape in weights.shapes.items():
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # readers map the values, which must be aligned
    bad: list[str] = []
    changed = not isinstance(weights, DifferenceWeights)
    names = logging.tqdm(weights.shapes, desc="write weights", unit="tensor") if progress else weights.shapes
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for name in names:
                    stored = weights.tensor(name).detach().to("cpu", dtype).contiguous()
                    file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
                    if not is_finite(stored):
                        bad.append(name)
                    changed = changed or bool(stored.any())
                    del stored  # so that one tensor at a time is in memory
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error}; check the disk's free space and permissions.") from error
        if bad:
            raise ValueError(
                f"{len(bad)} tensors of {weights.label} are not finite as {dtype} ({listed(bad)}); check the weights, "
                "or pass dtype=torch.float32."
            )
        if not changed:
            raise ValueError(f"{weights.label} is zero in every weight; pass two models that differ.")
        weights.require_unchanged()


def verify_delta(delta: Delta, module: nn.Module) -> None:
    """Checks that a delta can be merged into the module: names, shapes and every value. Changes nothing.

    Raises:
        ValueError: one line that says what does not fit, naming up to five tensors of each kind.
    """
    weights = opened(delta)
    read_recipe(weights)
    weights, targets, _ = fit_delta(weights, uncompiled(module))
    require_difference(weights, targets)
    require_finite(Applied(), targets, [], [Term(weights, 1.0)])


def read_delta_recipe(path: str | os.PathLike[str]) -> DeltaRecipe:
    """The sampling settings a delta file names; fields it does not name are None.

    Raises:
        ValueError: the file cannot be read, or its settings make no sense.
    """
    return read_recipe(open_weights(path))
