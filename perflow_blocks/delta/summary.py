"""What a set of weights consists of: kinds of layers, types, sizes and norms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from .files import Weights, is_lora, named_alike, row_chunks, rows_of

WHOLE_NORM, DIFFERENCE_NORM = 0.5, 0.1
"""Mean of the scales of normalization layers above which weights are whole, and absolute value below which they are
surely differences: a trained model's are about 1, the differences of two models' about 0."""

KINDS = {
    "norm": "normalization",
    "attn2.": "cross-attention",
    "attn1.": "self-attention",
    ".ff.": "feed-forward",
    "embedding.": "embedding of time and size",
    "time_emb_proj.": "embedding of time and size",
    "conv": "convolution",
}
"""Kinds of layer by parts of their names, the first that is there."""


@dataclass(frozen=True, kw_only=True)
class TensorSummary:
    """One tensor.

    Attributes:
        name: its key.
        kind: of layer, as `kind_of` says.
        dtype: as it is stored.
        parameters: numbers in it.
        bytes: that they take.
        squared_norm: sum of the squares; NaN or infinite where a value is.
        mean: of the values; 0 for none.
        reference: sum of the squares of the base's tensor; None where there is no base.
    """

    name: str
    kind: str
    dtype: torch.dtype
    parameters: int
    bytes: int
    squared_norm: float
    mean: float
    reference: float | None = None

    @property
    def size(self) -> float:
        """Norm over that of the base's tensor; without a base the root of the mean square. At least 0."""
        whole = self.parameters if self.reference is None else self.reference
        if not whole:
            return math.inf if self.squared_norm else 0.0
        return math.sqrt(self.squared_norm / whole)


@dataclass(frozen=True, kw_only=True)
class WeightSummary:
    """All tensors, in their order."""

    tensors: tuple[TensorSummary, ...]

    @property
    def what(self) -> str:
        """ "LoRA", "delta", "weights" (of a model), or "delta or weights" where no normalization layer tells."""
        if is_lora(tensor.name for tensor in self.tensors):
            return "LoRA"
        means = [tensor.mean for tensor in self.tensors if _is_norm_scale(tensor.name)]
        if not means:
            return "delta or weights"
        return "weights" if sum(means) / len(means) > WHOLE_NORM else "delta"

    @property
    def dtypes(self) -> str:
        """The types, the most frequent first."""
        counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors)
        return ", ".join(name for name, _ in counts.most_common())

    @property
    def norm(self) -> float:
        """Frobenius norm of all."""
        return math.sqrt(sum(tensor.squared_norm for tensor in self.tensors))

    @property
    def not_finite(self) -> list[str]:
        """Names of the tensors with a value that is infinite or NaN."""
        return [tensor.name for tensor in self.tensors if not math.isfinite(tensor.squared_norm)]

    def kinds(self) -> dict[str, list[TensorSummary]]:
        """The tensors by kind, the kind with most numbers first."""
        groups: dict[str, list[TensorSummary]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.kind, []).append(tensor)
        return dict(sorted(groups.items(), key=lambda group: -sum(tensor.parameters for tensor in group[1])))

    def largest(self, count: int) -> list[TensorSummary]:
        """The `count` tensors of the largest `size`, first the largest."""
        return sorted(self.tensors, key=lambda tensor: -tensor.size)[:count]


def mean_norm_scale(weights: Weights) -> float | None:
    """Mean of the scales of the normalization layers, to compare with `WHOLE_NORM`; None where there are none."""
    means = [float(weights.tensor(name).double().mean()) for name in weights.shapes if _is_norm_scale(name)]
    return sum(means) / len(means) if means else None


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """Of layer, by the names that diffusers gives in a UNet, else by the number of dimensions."""
    known = next((kind for part, kind in KINDS.items() if part in name), None)
    return known or ("convolution" if len(shape) == 4 else "linear" if len(shape) == 2 else "other")


def summarise(weights: Weights, base: Weights | None = None, config: Mapping[str, Any] | None = None) -> WeightSummary:
    """Reads every tensor once; sizes are relative to `base` where it is given.

    The two may be named differently: for original Latent Diffusion names `config` is the configuration of the UNet.
    diffusers' progress bar shows the tensors.

    Raises:
        ValueError: the base has none of a name.
    """
    if base is not None:
        weights, base = named_alike(weights, base, config or {})
        missing = [name for name in weights.shapes if name not in base.shapes]
        if missing:
            raise ValueError(f"{base.label} has no {missing[0]}; pass the base that {weights.label} was taken from.")
    summaries = []
    for name in logging.tqdm(weights.shapes, desc="read", unit="tensor"):
        tensor = weights.tensor(name)
        squares, total = _sums(tensor)
        summaries.append(
            TensorSummary(
                name=name,
                kind=kind_of(name, tuple(tensor.shape)),
                dtype=tensor.dtype,
                parameters=tensor.numel(),
                bytes=tensor.nbytes,
                squared_norm=squares,
                mean=total / tensor.numel() if tensor.numel() else 0.0,
                reference=None if base is None else _sums(base.tensor(name))[0],
            )
        )
    return WeightSummary(tensors=tuple(summaries))


def _is_norm_scale(name: str) -> bool:
    return "norm" in name and name.endswith(".weight")


def _sums(tensor: Tensor) -> tuple[float, float]:
    """Sum of the squares and sum of the values, a part of the rows at a time."""
    squares = total = 0.0
    for start, stop in row_chunks(tensor.shape):
        rows = rows_of(tensor, start, stop).double()
        squares += float(rows.square().sum())
        total += float(rows.sum())
    return squares, total
