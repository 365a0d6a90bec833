"""What the tests of attention strategies share: calls as in SDXL, in small, and the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from perflow_blocks.attention import strategies
from perflow_blocks.attention.strategies import AttentionStrategy, get_attention_strategy, register_attention_strategy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = (torch.float16, torch.bfloat16)
QUERY = (2, 64, 10, 64)
KEYS = {"self": 64, "cross": 77}


def tensors(
    keys: int = 64, dtype: torch.dtype = torch.float32, queries: int = 64, head_dim: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, 10, head_dim) for length in (queries, keys, keys)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula, in float64."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double())


class Kernel(AttentionStrategy):
    """Computes as `native` does, plus `shift`, and notes the shapes of every call, and of every `require`."""

    def __init__(self, shift: float = 0.0, **fields: Any) -> None:
        super().__init__(**fields)
        self.shift = shift
        self.calls: list[tuple[int, ...]] = []
        self.required: list[tuple[torch.device, torch.dtype, int]] = []

    def require(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        self.required.append((device, dtype, head_dim))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append(tuple(query.shape))
        return get_attention_strategy("native")(query, key, value, mask) + self.shift


@pytest.fixture
def own_names() -> Iterator[None]:
    """Takes what a test registers out again."""
    before = dict(strategies._STRATEGIES)
    yield
    strategies._STRATEGIES.clear()
    strategies._STRATEGIES.update(before)


@pytest.fixture
def kernel(own_names: None) -> Callable[..., Kernel]:
    """Registers a `Kernel` under a name, for the length of a test."""
    return lambda name, **settings: register_attention_strategy(name, Kernel(**settings))


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
    return {row.module: row.calls for row in pipe.attention.report().rows}


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
