"""What the tests of attention strategies share: calls as in SDXL, in small, and the formula."""

from __future__ import annotations

import torch
from torch import Tensor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH, HEADS, HEAD_DIM = 2, 10, 64
QUERY = (BATCH, 64, HEADS, HEAD_DIM)
KEYS = {"self": 64, "cross": 77}
ON_CPU = ("native", "native_math", "native_flash", "flex", "sliced", "auto")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tensors(keys: int, dtype: torch.dtype = torch.float32, queries: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, length, HEADS, HEAD_DIM) for length in (queries, keys, keys)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    """In every form that broadcasts; no query is without a key."""
    generator = torch.Generator().manual_seed(1)

    def boolean(*shape: int) -> Tensor:
        chosen = torch.rand(shape, generator=generator) > 0.4
        chosen[..., 0] = True
        return chosen

    return {
        "none": None,
        "additive": torch.randn(BATCH, HEADS, queries, keys, generator=generator),
        "of the keys": torch.randn(BATCH, 1, 1, keys, generator=generator),
        "three dimensions": torch.randn(HEADS, queries, keys, generator=generator),
        "queries and keys": torch.randn(queries, keys, generator=generator),
        "boolean": boolean(BATCH, 1, 1, keys),
        "boolean by head": boolean(1, HEADS, queries, keys),
    }


FORMS = tuple(masks(1, 1))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The formula, in float64."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double())
