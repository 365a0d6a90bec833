"""Attention in slices of the queries, for less memory where no fused kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import NativeAttention, with_four_dimensions
from .strategy import AttentionStrategy


class SlicedAttention(AttentionStrategy):
    """The queries in slices, each through torch's scaled_dot_product_attention; exact.

    Where torch has no fused kernel for a call (its math kernel), the scores (batch, heads, queries, keys) are the
    largest tensor there is; here never more than `slice_size` rows of them exist. Where it has one, they never exist,
    and slices only cost time.

    Args:
        slice_size: how many queries at a time. By default 512: of SDXL's largest self-attention (4096 queries and
            keys, 10 heads, batch 2) that is 160 MiB of scores in float32, as the math kernel has them, in place of
            1.25 GiB, in eight calls; SDXL's smaller ones (1024 queries) take two.

    Raises:
        ValueError: a slice size that is no integer above 0.
    """

    compilable = True
    cuda_graphs = True

    def __init__(self, slice_size: int = 512) -> None:
        if isinstance(slice_size, bool) or not isinstance(slice_size, int) or slice_size < 1:
            raise ValueError(
                f"slice_size={slice_size!r} is no number of queries; pass an integer above 0, such as 512."
            )
        self.slice_size = slice_size
        self._native = NativeAttention()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if query.shape[1] <= self.slice_size:
            return self._native(query, key, value, mask)
        mask = with_four_dimensions(mask)
        result = torch.empty_like(query)
        for start in range(0, query.shape[1], self.slice_size):
            rows = slice(start, start + self.slice_size)
            part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
            result[:, rows] = self._native(query[:, rows], key, value, part)
        return result
