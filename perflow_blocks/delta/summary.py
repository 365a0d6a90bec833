"""What files of weights hold: each tensor's kind of layer, type and size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusers.utils import logging
from torch import Tensor

from .files import Weights, row_chunks, rows_of

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


def summarize(weights: Weights, base: Weights | None) -> list[TensorSummary]:
    """Reads every tensor once; sizes are relative to `base`."""
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
    parts = (rows_of(tensor, start, stop) for start, stop in row_chunks(tensor.shape))
    return sum(float(part.double().square().sum()) for part in parts)
