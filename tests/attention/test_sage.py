"""SageAttention at its import boundary: layout, mask, keys in place, blocks of 64, and which release is called how."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from perflow_blocks.attention import sage
from perflow_blocks.attention.registry import get_attention_strategy
from perflow_blocks.attention.sage import FIRST_RELEASE, SECOND_RELEASE, SageAttention
from tests.attention.sage_double import install_sage, installed_sage, sageattn

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
SELF = (2, 128, 10, 64)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def error(result: Tensor, *inputs: Tensor) -> float:
    """Relative, against native in float32."""
    expected = get_attention_strategy("native")(*(tensor.float() for tensor in inputs))
    return float((result.float() - expected).norm() / expected.norm())


def named() -> SageAttention:
    strategy = SageAttention()
    strategy.name = "sage"
    return strategy


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_RELEASE", "SECOND_RELEASE"):
        relaxed = dataclasses.replace(getattr(sage, name), devices=None, compute_capability=(None, None))
        monkeypatch.setattr(sage, name, relaxed)


@pytest.fixture
def first_release(on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SageAttention:
    install_sage(monkeypatch, tmp_path)
    strategy = named()
    strategy.require(CPU, torch.float16, 64)
    installed_sage().calls.clear()
    return strategy


@pytest.mark.behaviour
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("keys", [128, 64])
def test_the_first_release_computes_attention(
    first_release: SageAttention, dtype: torch.dtype, head_dim: int, keys: int
) -> None:
    query, key, value = tensors((2, 128, 10, head_dim), *[(2, keys, 10, head_dim)] * 2, dtype=dtype)
    before = [tensor.clone() for tensor in (query, key, value)]
    result = first_release(query, key, value)
    assert installed_sage().calls == [tuple(query.shape)]
    assert result.shape == query.shape
    assert result.dtype == dtype
    assert 1e-4 < error(result, query, key, value) < 0.03  # another layout is wrong by more than 0.5
    for tensor, given in zip((query, key, value), before, strict=True):
        assert torch.equal(tensor, given)


def test_the_double_does_what_the_package_does() -> None:
    """What the strategy must guard against is there to be guarded against."""
    query, key, value = tensors(SELF, SELF, SELF)
    changed = key.clone()
    sageattn(query, changed, value, tensor_layout="NHD", attn_mask=torch.zeros(128, 128, dtype=torch.bool))
    assert not torch.equal(changed, key)
    assert error(sageattn(query, key.clone(), value), query, key, value) > 0.5
    query, short, values = tensors(SELF, (2, 77, 10, 64), (2, 77, 10, 64))
    assert error(sageattn(query, short.clone(), values, tensor_layout="NHD"), query, short, values) > 0.2


def test_the_kernel_is_launched_on_the_device_of_the_tensors(
    first_release: SageAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, entered = tensors(SELF, SELF, SELF), []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        entered.append((tensor is inputs[0], len(installed_sage().calls)))
        yield
        entered.append((True, len(installed_sage().calls)))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first_release(*inputs)
    assert entered == [(True, 0), (True, 1)]


@pytest.mark.behaviour
def test_keys_that_are_views_stay_as_they_are(first_release: SageAttention) -> None:
    """As fused projections give them: parts of one tensor."""
    (fused,) = tensors((2, 128, 3 * 640))
    before = fused.clone()
    query, key, value = (part.unflatten(-1, (10, 64)) for part in fused.chunk(3, dim=-1))
    assert error(first_release(query, key, value), query, key, value) < 0.03
    assert torch.equal(fused, before)


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("query", "key", "dtype", "mask", "reason"),
    [
        (SELF, SELF, torch.float16, None, None),
        (SELF, SELF, torch.float16, torch.zeros(1), "sage takes no mask"),
        (SELF, SELF, torch.float32, None, "sage takes float16 or bfloat16, not float32"),
        ((2, 64, 8, 40), (2, 64, 8, 40), torch.float16, None, "sage takes heads of 64, 96 or 128, not 40"),
        (SELF, (2, 77, 10, 64), torch.float16, None, "sage takes multiples of 64 keys, not 77"),
    ],
)
def test_the_first_release_refuses_what_it_would_get_wrong(
    first_release: SageAttention,
    query: tuple[int, ...],
    key: tuple[int, ...],
    dtype: torch.dtype,
    mask: Tensor | None,
    reason: str | None,
) -> None:
    assert first_release.supports(query, key, dtype, CPU, mask) == reason
    if reason is not None:
        with pytest.raises(ValueError, match=f"^{reason}; use the strategy 'native'"):
            inputs = tensors(query, key, key, dtype=dtype)
            first_release(inputs[0], inputs[1], inputs[2], mask)
        assert installed_sage().calls == []


def test_it_stands_on_cuda() -> None:
    strategy = get_attention_strategy("sage")
    assert strategy.supports(SELF, SELF, torch.float16, CPU) == "sage runs on cuda, not cpu"
    assert strategy.supports(SELF, SELF, torch.float16, CUDA) is None
    assert not strategy.exact and not strategy.compilable and not strategy.cuda_graphs


@pytest.mark.behaviour
@pytest.mark.parametrize("release", ["1.0.6", "2.2.0"])
def test_the_wrong_device_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str) -> None:
    install_sage(monkeypatch, tmp_path, release)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
    with pytest.raises(ValueError, match="'sage' runs on cuda, and the model is on cpu; move the model, or choose"):
        named().require(CPU, torch.float16, 64)


@pytest.mark.behaviour
def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"needs sageattention >= 1\.0\.6.*; pip install 'perflow-blocks\[sage\]'"):
        named().require(CUDA, torch.float16, 64)


@pytest.mark.parametrize("release", ["1.0.5", "2.0.1"])
def test_releases_between_are_refused(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    install_sage(monkeypatch, tmp_path, release)
    with pytest.raises(ImportError, match=rf"{release} is installed, so pip install sageattention==1\.0\.6"):
        named().require(CPU, torch.float16, 64)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_triton_that_is_missing", "No module named 'a_triton_that_is_missing'; it needs triton"),
        ("raise RuntimeError('0 active drivers')", "0 active drivers; it needs triton"),
    ],
)
def test_a_package_that_cannot_be_imported_is_an_import_error(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str
) -> None:
    install_sage(monkeypatch, tmp_path, source=source)
    with pytest.raises(ImportError, match=f"the installed 1.0.6 cannot be imported: {message}"):
        named().require(CPU, torch.float16, 64)


@pytest.mark.behaviour
def test_a_kernel_that_computes_something_else_is_refused(
    first_release: SageAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transposed(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND") -> Tensor:
        return sageattn(q, k, v)

    monkeypatch.setattr(installed_sage(), "sageattn", transposed)
    with pytest.raises(ValueError, match="computes something else than attention"):
        first_release.require(CPU, torch.float16, 64)


@pytest.fixture
def dispatched(on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The second release where diffusers has imported it; its calls."""
    seen: list[dict[str, Any]] = []

    def second(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        seen.append(settings)
        return get_attention_strategy("native")(q, k, v) * 1.01

    install_sage(monkeypatch, tmp_path, "2.1.1", source="raise ImportError('not to be imported here')")
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
    monkeypatch.setattr(attention_dispatch, "sageattn", second)
    return seen


@pytest.mark.behaviour
def test_the_second_release_goes_through_the_dispatcher(dispatched: list[dict[str, Any]]) -> None:
    strategy = named()
    strategy.require(CPU, torch.bfloat16, 64)
    dispatched.clear()
    inputs = tensors(SELF, (2, 77, 10, 64), (2, 77, 10, 64))
    assert strategy.supports(SELF, (2, 77, 10, 64), torch.float16, CPU) is None
    assert strategy.supports((2, 64, 8, 160), (2, 64, 8, 160), torch.float16, CPU) is not None
    result = strategy(*inputs)
    assert [settings["tensor_layout"] for settings in dispatched] == ["NHD"]
    assert error(result, *inputs) == pytest.approx(0.01, rel=0.1)
    with pytest.raises(ValueError, match="sage takes no mask"):
        strategy(inputs[0], inputs[1], inputs[2], torch.zeros(1, 1, 1, 77))


def test_a_second_release_that_diffusers_could_not_import_is_named(
    dispatched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", False)
    with pytest.raises(ImportError, match=r"diffusers could not import the installed 2\.1\.1"):
        named().require(CPU, torch.float16, 64)


def test_until_it_is_required_the_narrower_limits_hold() -> None:
    assert named().constraints == FIRST_RELEASE
    assert FIRST_RELEASE.key_multiple == 64
    assert SECOND_RELEASE.key_multiple == 1


def test_copies_go_on_as_the_original(first_release: SageAttention) -> None:
    """A UNet with its processors is copied, and sent to other processes."""
    inputs = tensors(SELF, SELF, SELF)
    expected = first_release(*inputs)
    for other in (copy.deepcopy(first_release), pickle.loads(pickle.dumps(first_release))):
        assert other.name == "sage"
        assert torch.equal(other(*inputs), expected)


@pytest.mark.behaviour
def test_it_is_not_imported_before_it_is_required(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What fails without a GPU must not keep the package from being imported."""
    install_sage(monkeypatch, tmp_path, source="raise RuntimeError('0 active drivers')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import perflow_blocks.attention.registry"
    subprocess.run([sys.executable, "-c", code], check=True)
