"""What the tests of attention strategies share: calls as in SDXL, in small, and the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from perflow_blocks.attention import registry
from perflow_blocks.attention.registry import get_attention_strategy, register_attention_strategy
from perflow_blocks.attention.strategy import AttentionConstraints, AttentionStrategy

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


HALF = (torch.float16, torch.bfloat16)


class Kernel(AttentionStrategy):
    """Computes as `native` does, plus `shift`, and notes the shapes of every call, and of every `require`."""

    def __init__(self, shift: float = 0.0, **constraints: Any) -> None:
        self.constraints = AttentionConstraints(**constraints)
        self.shift = shift
        self.calls: list[tuple[int, ...]] = []
        self.required: list[tuple[torch.device, torch.dtype, int]] = []

    def require(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        self.required.append((device, dtype, head_dim))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append(tuple(query.shape))
        return get_attention_strategy("native")(query, key, value, mask) + self.shift


@contextmanager
def registered(name: str, strategy: Any) -> Iterator[Any]:
    register_attention_strategy(name, strategy)
    try:
        yield strategy
    finally:
        del registry._STRATEGIES[name]


@pytest.fixture
def kernel() -> Iterator[Callable[..., Kernel]]:
    """Registers a `Kernel` under a name, for the length of a test."""
    with ExitStack() as stack:
        yield lambda name, **settings: stack.enter_context(registered(name, Kernel(**settings)))


def attentions(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def processors(model: Any) -> dict[str, Any]:
    return {name: module.processor for name, module in attentions(model).items()}


def assert_same_processors(model: Any, before: dict[str, Any]) -> None:
    """The very objects."""
    after = processors(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def calls_of(pipe: Any) -> dict[str, dict[str, int]]:
    """By module, the report's counters."""
    return {row.module: dict(row.calls) for row in pipe.attention.report().rows}


def embeddings(batch: int = 2) -> dict[str, Any]:
    """What a call of the tiny UNet takes besides sample and timestep."""
    source = torch.Generator().manual_seed(0)
    return {
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=source),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 16, generator=source),
            "time_ids": torch.randn(batch, 6, generator=source),
        },
        "return_dict": False,
    }


SAMPLE = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
