"""Attention strategies by name: a user's own, what is refused, and that the table covers what diffusers has."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from perflow_blocks.attention import registry
from perflow_blocks.attention.kernels import DispatchedAttention
from perflow_blocks.attention.registry import (
    attention_strategy_names,
    get_attention_strategy,
    register_attention_strategy,
)
from perflow_blocks.attention.strategy import AttentionConstraints, AttentionStrategy
from tests.attention.conftest import CPU, QUERY, attention

LEFT_OUT = {
    # For sequences of several lengths in one tensor; all that a UNet has in a batch are equally long.
    "flash_varlen", "flash_varlen_hub", "_flash_varlen_3", "_flash_3_varlen_hub", "sage_varlen",
    # For devices that the pipelines here do not run on.
    "_native_npu", "_native_xla",
    # Single kernels of SageAttention 2; `sage` chooses among them by device.
    "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton",
}  # fmt: skip


def test_every_kernel_of_the_dispatcher_has_a_name_or_is_left_out() -> None:
    ours = {
        strategy.backend.value.removeprefix("_"): name
        for name in attention_strategy_names()
        if isinstance(strategy := get_attention_strategy(name), DispatchedAttention)
    }
    assert all(backend == name for backend, name in ours.items())
    covered = {*ours, "sage"}  # which calls the dispatcher where it can
    assert LEFT_OUT | {b.value for b in AttentionBackendName if b.value.removeprefix("_") in covered} == {
        backend.value for backend in AttentionBackendName
    }
    assert not {name.removeprefix("_") for name in LEFT_OUT} & covered


@pytest.fixture
def own_names() -> Iterator[None]:
    before = dict(registry._STRATEGIES)
    yield
    registry._STRATEGIES.clear()
    registry._STRATEGIES.update(before)


seen: list[tuple[torch.dtype, int, int]] = []


class Mine(AttentionStrategy):
    """The least that a user writes."""

    constraints = AttentionConstraints(dtypes=(torch.float32,), head_dims=(32, 64), mask=False, min_sequence=8)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        seen.append((query.dtype, query.shape[3], key.shape[1]))
        return attention(query, key, value, mask).to(query.dtype)


@pytest.mark.behaviour
@pytest.mark.parametrize("made", [Mine, Mine()])
def test_a_strategy_of_ones_own(own_names: None, made: Any) -> None:
    assert register_attention_strategy("mine", made) is made
    strategy = get_attention_strategy("mine")
    seen.clear()
    strategy.require(CPU, torch.float16, 40)  # neither of which it takes
    assert sorted(seen, key=str) == [(torch.float32, 32, 128), (torch.float32, 32, 77)]
    seen.clear()
    strategy.require(CPU, torch.float32, 64)
    assert {call[:2] for call in seen} == {(torch.float32, 64)}
    assert strategy.supports(QUERY, QUERY, torch.float32, CPU) is None
    assert strategy.choice(QUERY, QUERY, torch.float32, CPU) == "mine"
    short = (2, 7, 10, 64)
    assert strategy.supports(short, QUERY, torch.float32, CPU) == "mine takes 8 queries and keys or more, not 7 and 64"
    assert strategy.supports(QUERY, QUERY, torch.float16, CPU) == "mine takes float32, not float16"
    assert attention_strategy_names()[-1] == "mine"


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, v: v, "computes something else than attention on cpu: a relative error of"),
        (lambda q, k, v: torch.full_like(q, torch.nan), "computes something else than attention"),
        (lambda q, k, v: attention(q, k, v, None).transpose(1, 2), "gives .2, 3, 128, 64. for a query of"),
        (lambda q, k, v: 1 // 0, "fails on cpu: integer division or modulo by zero; choose another one"),
        (lambda q, k, v: attention(q, k.sub_(k.mean(1, keepdim=True)), v, None), "writes into its inputs"),
    ],
)
def test_a_kernel_that_does_not_compute_attention_is_refused(wrong: Callable[..., Tensor], message: str) -> None:
    class Wrong(Mine):
        name = "wrong"

        def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            return wrong(query, key, value)

    with pytest.raises(ValueError, match=f"attention strategy 'wrong' {message}"):
        Wrong().require(CPU, torch.float32, 64)


@pytest.mark.parametrize(("exact", "factor", "allowed"), [
    (True, 1.005, True), (True, 1.1, False), (False, 1.1, True), (False, 1.3, False),
])  # fmt: skip
def test_quantised_kernels_may_be_less_exact(exact: bool, factor: float, allowed: bool) -> None:
    class Rough(Mine):
        def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().__call__(query, key, value) * factor

    strategy = Rough()
    strategy.exact = exact
    with contextlib.nullcontext() if allowed else pytest.raises(ValueError, match="something else than attention"):
        strategy.require(CPU, torch.float32, 64)


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("name", "strategy", "message"),
    [
        ("native", Mine, "name='native' is taken by NativeAttention; pass another one"),
        ("a b", Mine, "name='a b' is no Python identifier"),
        ("a=b", Mine, "name='a=b' is no Python identifier"),
        ("", Mine, "is no Python identifier"),
        ("mine", print, "is no AttentionStrategy; pass an instance or a class of one"),
        ("mine", registry.get_attention_strategy("native"), "is registered as 'native'; pass"),
    ],
)
def test_registrations_that_are_refused(own_names: None, name: str, strategy: Any, message: str) -> None:
    before = attention_strategy_names()
    with pytest.raises(ValueError, match=message):
        register_attention_strategy(name, strategy)
    assert attention_strategy_names() == before
    assert get_attention_strategy("native").name == "native"


@pytest.mark.behaviour
def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'nonsense' is unknown; pass one of native, ") as caught:
        get_attention_strategy("nonsense")
    assert all(name in str(caught.value) for name in attention_strategy_names())


@pytest.mark.parametrize("settings", [{"devices": ()}, {"dtypes": ()}, {"min_sequence": 0}, {"key_multiple": 0}])
def test_constraints_that_allow_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        AttentionConstraints(**settings)


@pytest.mark.parametrize("name", attention_strategy_names())
def test_strategies_can_be_copied_and_pickled(name: str) -> None:
    for other in (
        copy.deepcopy(get_attention_strategy(name)),
        pickle.loads(pickle.dumps(get_attention_strategy(name))),
    ):
        assert other.name == name
        assert other.constraints == get_attention_strategy(name).constraints


def test_what_computes_nothing_or_needs_arguments_is_refused() -> None:
    class NeedsArguments(AttentionStrategy):
        def __init__(self, size: int) -> None:
            self.size = size

        def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            return query

    names = attention_strategy_names()
    for strategy in (AttentionStrategy, AttentionStrategy()):
        with pytest.raises(ValueError, match="computes nothing; pass one that has a __call__"):
            register_attention_strategy("mine", strategy)
    with pytest.raises(ValueError, match=r"needs arguments .*size.*; pass an instance"):
        register_attention_strategy("mine", NeedsArguments)
    assert attention_strategy_names() == names
