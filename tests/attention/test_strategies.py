"""Attention strategies: those that run here compute attention, refuse what they cannot, and change nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor

from perflow_blocks.attention.kernels import DispatchedAttention
from perflow_blocks.attention.registry import attention_strategy_names, get_attention_strategy
from perflow_blocks.attention.strategy import AttentionConstraints, AttentionStrategy
from tests.attention.conftest import (
    CPU,
    CUDA,
    DTYPES,
    FORMS,
    KEYS,
    ON_CPU,
    QUERY,
    ROUNDING,
    attention,
    masks,
    tensors,
)


@pytest.mark.behaviour
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ON_CPU)
def test_a_call_that_is_taken_gives_attention(name: str, dtype: torch.dtype, form: str, kind: str) -> None:
    strategy, inputs = get_attention_strategy(name), tensors(KEYS[kind], dtype)
    mask = masks(64, KEYS[kind])[form]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    before = [tensor.clone() for tensor in inputs]
    reason = strategy.supports(inputs[0].shape, inputs[1].shape, dtype, CPU, mask)
    if reason is not None:
        assert_the_dispatcher_refuses(strategy, *inputs, mask)
        return
    result = strategy(*inputs, mask)
    assert result.shape == inputs[0].shape
    assert result.dtype == dtype
    expected = attention(*inputs, mask)
    assert (result - expected).norm() < ROUNDING[dtype] * expected.norm()
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))


def assert_the_dispatcher_refuses(
    strategy: AttentionStrategy, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> None:
    """By the checks that diffusers has for this kernel, or when it is called."""
    assert isinstance(strategy, DispatchedAttention)
    with pytest.raises((ValueError, RuntimeError)):
        for check in _AttentionBackendRegistry._constraints[strategy.backend]:
            check(query=query, key=key, value=value, attn_mask=mask, is_causal=False)
        attention_dispatch.dispatch_attention_fn(query, key, value, attn_mask=mask, backend=strategy.backend)


@pytest.mark.parametrize(
    ("name", "dtype", "masked"),
    [(n, d, m) for n in ON_CPU for d in DTYPES for m in (False, True) if n != "native_flash"]
    + [("native_flash", torch.float16, False), ("native_flash", torch.bfloat16, False)],
)
def test_every_call_that_could_be_taken_is(name: str, dtype: torch.dtype, masked: bool) -> None:
    mask = torch.zeros(1, 1, 1, 77, dtype=dtype) if masked else None
    assert get_attention_strategy(name).supports(QUERY, (2, 77, 10, 64), dtype, CPU, mask) is None


@pytest.mark.parametrize("name", ["native_efficient", "native_cudnn"])
def test_what_is_refused_on_a_cpu_does_not_run_there(name: str) -> None:
    strategy = get_attention_strategy(name)
    assert strategy.supports(QUERY, QUERY, torch.float16, CPU) == f"{name} runs on cuda, not cpu"
    assert_the_dispatcher_refuses(strategy, *tensors(64, torch.float16), None)


@pytest.mark.parametrize("name", ["native", "native_math", "native_flash"])
def test_causal_calls_are_causal(name: str) -> None:
    inputs = tensors(64, torch.float16)
    strategy: Any = get_attention_strategy(name)
    assert strategy.supports(QUERY, QUERY, torch.float16, CPU, is_causal=True) is None
    below = torch.ones(64, 64, dtype=torch.bool).tril()
    expected = attention(*inputs, below)
    assert (strategy(*inputs, is_causal=True) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("name", [n for n in attention_strategy_names() if not n.startswith("native") and n != "auto"])
def test_other_causal_calls_are_refused(name: str) -> None:
    strategy: Any = get_attention_strategy(name)
    reason = strategy.supports(QUERY, QUERY, torch.bfloat16, CUDA, is_causal=True)
    assert reason == f"{name} computes no causal attention"
    if isinstance(strategy, DispatchedAttention):
        with pytest.raises(ValueError, match="computes no causal attention"):
            strategy(*tensors(64, torch.bfloat16), is_causal=True)


@pytest.mark.behaviour
@pytest.mark.parametrize("name", attention_strategy_names())
def test_nothing_global_changes(name: str) -> None:
    def world() -> Any:
        known = _AttentionBackendRegistry
        flags = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()]
        return (
            known._active_backend,
            dict(known._backends),
            known._checks_enabled,
            flags,
            torch.get_rng_state().tolist(),
        )

    before, strategy = world(), get_attention_strategy(name)
    try:
        strategy.require(CPU, torch.float32, 64)
        strategy(*tensors(64, torch.float16))
    except (ImportError, ValueError):
        assert name not in ON_CPU
    assert world() == before


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "sliced"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_with_its_checks(name: str, masked: bool) -> None:
    strategy, native = get_attention_strategy(name), get_attention_strategy("native")
    strategy.require(CPU, torch.float16, 64)
    assert strategy.compilable

    def routed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        reason = strategy.supports(query.shape, key.shape, query.dtype, query.device, mask)
        return (native if reason is not None else strategy)(query, key, value, mask)

    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(routed, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float16, torch.float32):
        inputs = (*tensors(77, dtype), torch.zeros(2, 1, 1, 77, dtype=dtype) if masked else None)
        expected = routed(*inputs)
        assert (compiled(*inputs) - expected).norm() < ROUNDING[dtype] * expected.norm()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"key_multiple": 64}, "takes multiples of 64 keys, not 77"),
        ({"min_sequence": 100}, "takes 100 queries and keys or more, not 64 and 77"),
        ({"head_dims": range(8, 33, 8)}, "takes heads of 8 to 32 in steps of 8, not 64"),
        ({"head_dims": (40, 80)}, "takes heads of 40 or 80, not 64"),
        ({"dtypes": (torch.float16, torch.bfloat16)}, "takes float16 or bfloat16, not float32"),
        ({"head_dims": range(8, 65, 8), "min_sequence": 64, "key_multiple": 7}, None),
    ],
)
def test_limits_can_be_traced_with_any_shape(limits: dict[str, Any], reason: str | None) -> None:
    constraints = AttentionConstraints(**limits)

    def taken(query: Tensor, key: Tensor) -> Tensor:
        against = constraints.against(
            query.shape, key.shape, query.dtype, query.device, has_mask=False, is_causal=False
        )
        return query + 1 if against is None else query

    query, key, _ = tensors(77)
    shapes = query.shape, key.shape
    assert constraints.against(*shapes, torch.float32, CPU, has_mask=False, is_causal=False) == reason
    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(taken, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(query, key), query + 1 if reason is None else query)
