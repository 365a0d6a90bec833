"""Slices hold no more scores than they say; `auto` takes what is there, never what is not exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from perflow_blocks.attention.auto import AutoAttention
from perflow_blocks.attention.registry import get_attention_strategy
from perflow_blocks.attention.sliced import SlicedAttention
from perflow_blocks.attention.strategy import AttentionConstraints, AttentionStrategy
from tests.attention.conftest import CPU, FORMS, QUERY, attention, masks, tensors

META = torch.device("meta")


@pytest.mark.behaviour
@pytest.mark.parametrize("slice_size", [1, 16, 25, 64, 512])
@pytest.mark.parametrize("form", FORMS)
def test_slices_give_attention(slice_size: int, form: str) -> None:
    inputs, mask = tensors(77), masks(64, 77)[form]
    result, expected = SlicedAttention(slice_size=slice_size)(*inputs, mask), attention(*inputs, mask)
    assert result.shape == inputs[0].shape
    assert (result - expected).norm() < 1e-6 * expected.norm()


class Scores(TorchDispatchMode):
    """The sizes of all tensors that are made with one entry per query of a slice, or of all, and key."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys, self.largest = keys, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (self.keys,):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.behaviour
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slice_size", [16, 24, 80])
def test_no_more_scores_than_a_slice_are_held(slice_size: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, length, 3, 8, generator=generator) for length in (80, 96, 96))
    mask = torch.zeros(1, 1, 80, 96) if masked else None
    sizes = []
    for strategy in (SlicedAttention(slice_size=slice_size), get_attention_strategy("native")):
        with sdpa_kernel(SDPBackend.MATH), Scores(keys=96) as scores:
            strategy(query, key, value, mask)
        sizes.append(scores.largest)
    assert sizes == [2 * 3 * slice_size * 96, 2 * 3 * 80 * 96]


def test_each_slice_is_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = SlicedAttention(slice_size=24)
    native, seen = strategy._native, []

    def watched(query: Tensor, *others: Any) -> Tensor:
        seen.append(query.shape[1])
        return native(query, *others)

    monkeypatch.setattr(strategy, "_native", watched)
    strategy(*tensors(77))
    assert seen == [24, 24, 16]


@pytest.mark.parametrize("slice_size", [0, -1, 2.0, True, "64", None])
def test_slice_sizes_that_are_none(slice_size: Any) -> None:
    with pytest.raises(ValueError, match="is no number of queries; pass an integer above 0"):
        SlicedAttention(slice_size=slice_size)


def test_slices_compile() -> None:
    torch._dynamo.reset()
    strategy = SlicedAttention(slice_size=24)
    assert strategy.compilable
    inputs = (*tensors(77), torch.randn(2, 1, 64, 77))
    compiled: Any = torch.compile(strategy.__call__, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*inputs), strategy(*inputs), atol=1e-6)


class Kernel(AttentionStrategy):
    """Counts its calls."""

    compilable = True
    cuda_graphs = True

    def __init__(self, name: str, constraints: AttentionConstraints, *, fails_on: tuple[str, ...] = ()) -> None:
        self.name, self.constraints, self.fails_on, self.calls = name, constraints, fails_on, 0

    def require(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        if device.type in self.fails_on:
            raise ImportError("not installed")
        self.require_device(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        return attention(query, key, value, mask).to(query.dtype)


def kernels() -> list[Kernel]:
    return [
        Kernel("absent", AttentionConstraints(), fails_on=("cpu", "meta")),
        Kernel("elsewhere", AttentionConstraints(), fails_on=("cpu",)),
        Kernel("maskless", AttentionConstraints(mask=False, devices=("cpu",))),
        Kernel("halves", AttentionConstraints(dtypes=(torch.float16,), devices=("cpu",))),
    ]


def test_the_first_that_runs_and_takes_the_call_is_chosen() -> None:
    candidates = kernels()
    auto = AutoAttention(candidates, otherwise=get_attention_strategy("native"))
    mask = torch.zeros(1, 1, 1, 64)
    assert auto.choice(QUERY, QUERY, torch.float32, CPU) == "native"  # nothing is known yet
    auto.require(CPU, torch.float32, 64)
    assert auto.choice(QUERY, QUERY, torch.float32, CPU) == "maskless"
    assert auto.choice(QUERY, QUERY, torch.float16, CPU, mask) == "halves"
    assert auto.choice(QUERY, QUERY, torch.float32, CPU, mask) == "native"
    assert auto.supports(QUERY, QUERY, torch.float32, CPU, mask) is None
    inputs = tensors(64)
    for given in (None, mask):
        expected = attention(*inputs, given)
        assert (auto(*inputs, given) - expected).norm() < 1e-6 * expected.norm()
    assert [kernel.calls for kernel in candidates] == [0, 0, 1, 0]


def test_each_device_has_its_own_choice() -> None:
    auto = AutoAttention(kernels(), otherwise=Kernel("rest", AttentionConstraints()))
    for device, name in ((CPU, "maskless"), (META, "elsewhere"), (CPU, "maskless")):
        auto.require(device, torch.float32, 64)
        assert auto.choice(QUERY, QUERY, torch.float32, device) == name
    assert auto.choice(QUERY, QUERY, torch.float32, META) == "elsewhere"
    assert copy.deepcopy(auto).choice(QUERY, QUERY, torch.float32, META) == "elsewhere"


def test_it_is_as_traceable_as_what_it_chooses_from() -> None:
    candidates = kernels()
    auto = AutoAttention(candidates, otherwise=get_attention_strategy("native"))
    candidates[0].compilable = candidates[2].cuda_graphs = False
    auto.require(CPU, torch.float32, 64)
    assert auto.compilable  # what is absent does not matter
    assert not auto.cuda_graphs


def test_quantised_kernels_are_never_chosen() -> None:
    with pytest.raises(ValueError, match=r"candidates=\['sage'\] are wrong because they are not exact"):
        AutoAttention([get_attention_strategy("flash"), get_attention_strategy("sage")], kernels()[0])


def test_the_registered_one_has_flash_attention_before_native_and_downloads_nothing() -> None:
    auto: Any = get_attention_strategy("auto")
    assert [strategy.name for strategy in auto.candidates] == ["flash_3", "flash"]
    assert auto.otherwise is get_attention_strategy("native")
