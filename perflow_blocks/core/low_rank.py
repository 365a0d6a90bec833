"""A weight difference as a product of two thin matrices, by truncated singular value decomposition.

The truncation is the best approximation of its rank in the Frobenius norm (Eckart and Young, 1936). A convolution's
kernel (out, in, k, k) counts as the matrix (out, in * k * k), which is what LoRA's pair of convolutions multiplies to:
k x k from `in` to `rank` channels, then 1 x 1 from `rank` to `out`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """The largest singular triples of a matrix (rows, columns), and the norm of the whole.

    `left` (rows, count) has orthonormal columns, `right` (count, columns) orthonormal rows; `values` (count,) are
    float64, descending. `squared_norm` is the whole matrix's (Frobenius), at least the sum of the squares of `values`.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    squared_norm: float


class Factors(NamedTuple):
    """`up @ down`, with up (rows, rank) and down (rank, columns)."""

    up: Tensor
    down: Tensor


def squared_norm(matrix: Tensor) -> float:
    """The squared Frobenius norm, row by row in the matrix's type and then in float64, without a copy."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def leading_spectrum(matrix: Tensor, count: int) -> Spectrum:
    """The `count` largest singular triples of a float32 or wider matrix, fewer where it has no more.

    Exact for small matrices. For large ones a randomised range finder with power iterations (Halko, Martinsson and
    Tropp, arXiv 0909.4061, by `torch.svd_lowrank`), with fixed seed: the caller's random state is left alone.
    """
    sketch = count + max(16, count // 2)
    if min(matrix.shape) <= 4 * sketch:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            left, values, transposed = torch.svd_lowrank(matrix, q=sketch, niter=4)
        right = transposed.mT
    return Spectrum(left[:, :count], values[:count].double(), right[:count], squared_norm(matrix))


def numerical_rank(spectrum: Spectrum) -> int:
    """The number of values above the rounding error of the type they were computed in; 0 for a zero matrix."""
    longer = max(len(spectrum.left), spectrum.right.shape[1])
    floor = spectrum.values[:1] * longer * torch.finfo(spectrum.left.dtype).eps
    return int((spectrum.values > floor).sum())


def rank_for_energy(spectrum: Spectrum, energy: float) -> int:
    """The least rank that keeps a share `energy` in (0, 1] of the squared norm, at most the numerical rank."""
    # The lost part is summed, from its smallest value: near energy 1 the kept part differs from the whole by rounding.
    tail = spectrum.values.square().flip(0).cumsum(0).flip(0)
    whole = float(tail[0]) if len(tail) else 0.0
    complete = len(tail) == min(len(spectrum.left), spectrum.right.shape[1])
    unseen = 0.0 if complete else max(spectrum.squared_norm - whole, 0.0)
    allowed = (1.0 - energy) * (whole + unseen)
    return min(int((tail + unseen > allowed).sum()), numerical_rank(spectrum))


def kept_energy(spectrum: Spectrum, rank: int) -> float:
    """The share, in [0, 1], of the squared norm in the `rank` largest singular values; 1 for a zero matrix."""
    if not spectrum.squared_norm:
        return 1.0
    return min(float(spectrum.values[:rank].square().sum()) / spectrum.squared_norm, 1.0)


def balanced_factors(spectrum: Spectrum, rank: int) -> Factors:
    """The truncation at `rank`, each side with the roots of the singular values, so that both have the same norm.

    In half precision that keeps both in range; all of the (small) values on one side might round to 0.
    """
    roots = spectrum.values[:rank].sqrt().to(spectrum.left.dtype)
    return Factors(up=spectrum.left[:, :rank] * roots, down=roots[:, None] * spectrum.right[:rank])


def squared_error(matrix: Tensor, factors: Factors) -> float:
    """The squared Frobenius norm of `matrix - up @ down`, the product taken in the matrix's type."""
    up, down = factors.up.to(matrix.dtype), factors.down.to(matrix.dtype)
    return squared_norm(torch.addmm(matrix, up, down, alpha=-1))
