"""Attention strategies: those that run here compute attention; what each takes and needs; a user's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from perflow_blocks.attention.strategies import (
    AttentionStrategy,
    attention_strategy_names,
    get_attention_strategy,
    register_attention_strategy,
    sliced_attention,
)
from tests.attention.conftest import CPU, CUDA, HALF, KEYS, attention, tensors

ON_CPU = ("native", "native_math", "native_flash", "flex", "sliced", "auto")
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3}


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    return {
        "none": None,
        "additive": torch.randn(2, 10, queries, keys, generator=generator),
        "of the keys": torch.randn(2, 1, 1, keys, generator=generator),
    }


@pytest.mark.behaviour
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("form", masks(1, 1))
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ON_CPU)
def test_a_call_that_is_taken_gives_attention(name: str, dtype: torch.dtype, form: str, kind: str) -> None:
    strategy, inputs = get_attention_strategy(name), tensors(KEYS[kind], dtype)
    mask = masks(64, KEYS[kind])[form]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    reason = strategy.refuses(inputs[0], inputs[1], mask)
    if name == "native_flash" and (mask is not None or dtype == torch.float32):
        assert reason == ("takes float16 or bfloat16, not float32" if dtype == torch.float32 else "takes no mask")
        return
    assert reason is None
    before = [tensor.clone() for tensor in inputs]
    result, expected = strategy(*inputs, mask), attention(*inputs, mask)
    assert result.shape == inputs[0].shape
    assert result.dtype == dtype
    assert (result - expected).norm() < ROUNDING[dtype] * expected.norm()
    assert all(map(torch.equal, inputs, before))


@pytest.mark.behaviour
@pytest.mark.parametrize("name", ON_CPU)
def test_nothing_global_changes(name: str) -> None:
    def world() -> Any:
        known = _AttentionBackendRegistry
        dispatcher = (known._active_backend, dict(known._backends), known._checks_enabled)
        flags = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
        return dispatcher, flags, torch.get_rng_state().tolist()

    before, strategy = world(), get_attention_strategy(name)
    strategy.require(CPU, torch.float32, 64)
    assert world() == before


GPU_TABLE = [  # name, types, heads that are taken, heads that are not, mask, exact
    ("native_cudnn", HALF, (64, 128), (36, 160), True, True),
    ("flash", HALF, (40, 64, 256), (257, 512), False, True),
    ("xformers", (torch.float32, *HALF), (40, 64, 160), (30, 512), False, True),
    ("sage", HALF, (64, 96, 128), (40, 160), False, False),
]


@pytest.mark.behaviour
@pytest.mark.parametrize(("name", "dtypes", "taken", "refused", "mask", "exact"), GPU_TABLE)
def test_limits_of_kernels_for_gpus(
    name: str, dtypes: Any, taken: tuple[int, ...], refused: tuple[int, ...], mask: bool, exact: bool
) -> None:
    strategy = get_attention_strategy(name)

    def reason(head_dim: int = 64, dtype: Any = torch.bfloat16, device: Any = CUDA, mask: Any = None) -> str | None:
        given: Any = SimpleNamespace(shape=(2, 128, 8, head_dim), dtype=dtype, device=device)
        return strategy.refuses(given, given, mask)

    assert strategy.exact == exact
    assert [reason(head_dim) for head_dim in taken] == [None] * len(taken)
    assert all("takes head sizes in" in str(reason(head_dim)) for head_dim in refused)
    assert all((reason(dtype=dtype) is None) == (dtypes is None or dtype in dtypes) for dtype in ROUNDING)
    assert reason(device=CPU) == "runs on cuda, not cpu"
    assert reason(mask=torch.zeros(1)) == (None if mask else "takes no mask")
    with pytest.raises(ValueError, match=f"'{name}' runs on cuda, and the model is on cpu; move the model"):
        strategy.require(CPU, torch.float16, 64)  # before any package is looked for or downloaded


INSTALLS = {name: "kernels" for name in attention_strategy_names() if name.endswith("_hub")} | {
    "flash": r"pip install 'perflow-blocks\[flash\]'",
    "flash_3": "build FA3",
    "xformers": r"pip install 'perflow-blocks\[xformers\]'",
}


@pytest.mark.behaviour
@pytest.mark.parametrize("name", INSTALLS)
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for package in ("FLASH_ATTN", "FLASH_ATTN_3", "XFORMERS_ATTN"):
        monkeypatch.setattr(attention_dispatch, f"_CAN_USE_{package}", False)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: False)
    with pytest.raises(ImportError, match=f"^attention strategy '{name}': .*{INSTALLS[name]}"):
        get_attention_strategy(name).require(CUDA, torch.float16, 64)


seen: list[tuple[torch.dtype, int, int]] = []


def my_function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    seen.append((query.dtype, query.shape[3], key.shape[1]))
    return attention(query, key, value, mask).to(query.dtype)


class Mine(AttentionStrategy):
    dtypes = (torch.float32,)
    head_dims = (32, 64)
    mask = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return my_function(query, key, value, mask)


FIELDS: dict[str, Any] = {"dtypes": Mine.dtypes, "head_dims": Mine.head_dims, "mask": False}


@pytest.mark.behaviour
@pytest.mark.parametrize(("made", "fields"), [(Mine, {}), (Mine(), {}), (my_function, FIELDS)])
def test_a_strategy_of_ones_own(own_names: None, made: Any, fields: dict[str, Any]) -> None:
    assert register_attention_strategy("mine", made, **fields) is made
    strategy = get_attention_strategy("mine")
    assert attention_strategy_names()[-1] == strategy.name == "mine"
    seen.clear()
    strategy.require(CPU, torch.float16, 40)  # neither of which it takes
    assert sorted(seen, key=str) == [(torch.float32, 32, 128), (torch.float32, 32, 77)]
    seen.clear()
    assert strategy.resolve(CPU, torch.float32, 64) is strategy
    assert {call[:2] for call in seen} == {(torch.float32, 64)}
    query, key, _ = tensors()
    assert strategy.refuses(query, key, None) is None
    assert strategy.refuses(query, key, torch.zeros(1, 1, 1, 64)) == "takes no mask"
    assert strategy.refuses(query.half(), key.half(), None) == "takes float32, not float16"
    assert copy.deepcopy(strategy) is pickle.loads(pickle.dumps(strategy)) is strategy


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, v, mask: v, "is not attention"),
        (lambda q, k, v, mask: attention(q, k, v) * 1.1, "is not attention"),
        (lambda q, k, v, mask: attention(q, k, v).transpose(1, 2), "must match the size"),
        (lambda q, k, v, mask: 1 // 0, "integer division or modulo by zero"),
    ],
)
def test_a_kernel_that_does_not_compute_attention_is_refused(wrong: Callable[..., Tensor], message: str) -> None:
    strategy = AttentionStrategy(wrong)
    strategy.name = "wrong"
    with pytest.raises(ValueError, match=f"'wrong' does not run on cpu: .*{message}.* such as 'native'"):
        strategy.require(CPU, torch.float32, 64)


def test_quantised_kernels_may_be_less_exact() -> None:
    for factor, allowed in ((1.1, True), (1.3, False)):
        rough = AttentionStrategy(lambda q, k, v, mask, factor=factor: attention(q, k, v) * factor, exact=False)
        try:
            rough.require(CPU, torch.float32, 64)
            assert allowed
        except ValueError:
            assert not allowed


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("name", "strategy", "fields", "message"),
    [
        ("native", Mine, {}, "name='native' is taken"),
        ("a b", Mine, {}, "name='a b' must be a Python identifier"),
        ("", Mine, {}, "name='' must be a Python identifier"),
        ("mine", 7, {}, "strategy=7 must be a function"),
        ("mine", get_attention_strategy("native"), {}, "must be a function or an AttentionStrategy without a name"),
        ("mine", my_function, {"dtype": HALF}, "no attribute 'dtype'"),
    ],
)
def test_registrations_that_are_refused(
    own_names: None, name: str, strategy: Any, fields: dict[str, Any], message: str
) -> None:
    before = attention_strategy_names()
    with pytest.raises(ValueError, match=message):
        register_attention_strategy(name, strategy, **fields)
    assert attention_strategy_names() == before
    assert get_attention_strategy("native").name == "native"


class Scores(TorchDispatchMode):
    """The size of the largest tensor that is made with one entry per key."""

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
@pytest.mark.parametrize("form", masks(1, 1))
@pytest.mark.parametrize("slice_size", [25, 64])
def test_slices_give_attention_and_hold_no_more_scores_than_their_own(slice_size: int, form: str) -> None:
    inputs, mask = tensors(96, head_dim=8), masks(64, 96)[form]
    with sdpa_kernel(SDPBackend.MATH), Scores(keys=96) as scores:
        result = sliced_attention(*inputs, mask, slice_size=slice_size)
    expected = attention(*inputs, mask)
    assert (result - expected).norm() < 1e-6 * expected.norm()
    if form in ("none", "of the keys"):  # the other mask is as large as all scores
        assert scores.largest == 2 * 10 * slice_size * 96


def test_auto_is_the_first_candidate_that_runs_and_takes_the_models_calls(own_names: None) -> None:
    assert get_attention_strategy("auto").candidates == ("flash_3", "flash", "native")  # exact, nothing downloads
    assert get_attention_strategy("auto").resolve(CPU, torch.float32, 64).name == "native"

    def missing() -> None:
        raise ImportError("not installed")

    register_attention_strategy("absent", my_function, load=missing)
    register_attention_strategy("elsewhere", my_function, devices=("cuda",))
    register_attention_strategy("half", my_function, dtypes=HALF)
    names = ("absent", "elsewhere", "half", "native")
    register_attention_strategy("choice", my_function, candidates=names)
    for dtype, chosen in ((torch.float16, "half"), (torch.float32, "native")):
        assert get_attention_strategy("choice").resolve(CPU, dtype, 64).name == chosen
