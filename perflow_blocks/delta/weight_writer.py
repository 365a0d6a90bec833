"""Writing a safetensors file one tensor at a time, so that memory holds one of them and not the file.

The format (https://huggingface.co/docs/safetensors/index#format): the header's length in 8 bytes, little endian, the
header in JSON, and the values of all tensors one after another. The library's own writer wants all of them at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from diffusers.utils import logging
from torch import Tensor

from .atomic import atomic_path
from .files import Weights
from .tensors import is_finite, listed

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


def write_weights(
    weights: Weights, path: str | os.PathLike[str], dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Writes all tensors as `dtype`; the file appears complete or not at all.

    diffusers' progress bar shows the tensors; `diffusers.utils.logging.disable_progress_bar()` hides it.

    Raises:
        ValueError: a `dtype` other than float32, float16 and bfloat16, values that are not finite in it, tensors that
            are all zero, or a path that cannot be written.
    """
    if dtype not in _NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _NAMES)
        raise ValueError(f"dtype={dtype} cannot be written; pass one of {known}.")
    bad: list[str] = []
    changed = False
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(_header(weights, dtype, metadata))
                for name in logging.tqdm(weights.shapes, desc="write weights", unit="tensor"):
                    finite, nonzero = _append(file, weights.tensor(name), dtype)
                    changed = changed or nonzero
                    if not finite:
                        bad.append(name)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error}; check the disk's free space and permissions.") from error
        if bad:
            raise ValueError(
                f"{len(bad)} tensors of {weights.label} are not finite as {dtype} ({listed(bad)}); "
                "check the weights, or choose float32."
            )
        if not changed:
            raise ValueError(f"{weights.label} is zero in every weight; pass two models that differ.")
        weights.require_unchanged()


def _append(file: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> tuple[bool, bool]:
    """Writes the values; returns whether they are finite as `dtype`, and whether one of them is not zero."""
    stored = tensor.detach().to("cpu", dtype).contiguous()
    file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
    return is_finite(stored), bool(stored.any())


def _header(weights: Weights, dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, shape in weights.shapes.items():
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)  # readers map the values, which must be aligned
    return len(text).to_bytes(8, "little") + text
