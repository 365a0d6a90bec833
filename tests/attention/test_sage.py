"""SageAttention at its import boundary: layout, mask, keys in place, blocks of 64, and which release is called how."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from perflow_blocks.attention import strategies
from perflow_blocks.attention.strategies import AttentionStrategy, get_attention_strategy
from tests.attention.conftest import CPU, CUDA, attention, tensors
from tests.attention.sage_double import install_sage, installed_sage, sageattn


def error(result: Tensor, *inputs: Tensor) -> float:
    expected = attention(*inputs)
    return float((result - expected).norm() / expected.norm())


def half(**sizes: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tensors(**{"keys": 128, "queries": 128, "dtype": torch.float16, **sizes})


def sage_on_cpu() -> AttentionStrategy:
    """What the package registers for the release that diffusers finds, on a CPU too."""
    del strategies._STRATEGIES["sage"]
    strategies._register_sage()
    strategy = get_attention_strategy("sage")
    strategy.devices = None
    return strategy


@pytest.fixture
def sage(own_names: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AttentionStrategy:
    """Release 1.0.6."""
    install_sage(monkeypatch, tmp_path)
    strategy = sage_on_cpu()
    strategy.require(CPU, torch.float16, 64)
    installed_sage().calls.clear()
    return strategy


@pytest.mark.behaviour
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.bfloat16, 96), (torch.float16, 128)])
def test_the_first_release_computes_attention(sage: AttentionStrategy, dtype: torch.dtype, head_dim: int) -> None:
    inputs = half(dtype=dtype, head_dim=head_dim)
    before = [tensor.clone() for tensor in inputs]
    result = sage(*inputs)
    assert installed_sage().calls == [tuple(inputs[0].shape)]
    assert result.shape == inputs[0].shape
    assert result.dtype == dtype
    assert 1e-4 < error(result, *inputs) < 0.03  # another layout is wrong by more than 0.5
    assert all(map(torch.equal, inputs, before))


def test_the_double_does_what_the_package_does() -> None:
    """What the strategy must guard against is there to be guarded against."""
    query, key, value = half()
    changed = key.clone()
    sageattn(query, changed, value, tensor_layout="NHD", attn_mask=torch.zeros(128, 128, dtype=torch.bool))
    assert not torch.equal(changed, key)
    assert error(sageattn(query, key.clone(), value), query, key, value) > 0.5
    query, key, value = half(keys=77)
    assert error(sageattn(query, key.clone(), value, tensor_layout="NHD"), query, key, value) > 0.2


@pytest.mark.behaviour
@pytest.mark.parametrize(
    ("sizes", "mask", "reason"),
    [
        ({}, None, None),
        ({}, torch.zeros(1, 1, 1, 128), "takes no mask"),
        ({"dtype": torch.float32}, None, "takes float16 or bfloat16, not float32"),
        ({"head_dim": 40}, None, r"takes head sizes in (64, 96, 128)"),
        ({"keys": 77}, None, "takes multiples of 64 keys"),
    ],
)
def test_the_first_release_refuses_what_it_would_get_wrong(
    sage: AttentionStrategy, sizes: dict[str, Any], mask: Tensor | None, reason: str | None
) -> None:
    query, key, _ = half(**sizes)
    assert sage.refuses(query, key, mask) == reason
    assert not sage.exact and not sage.compilable


@pytest.mark.behaviour
def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(strategies, "version", missing)
    with pytest.raises(ImportError, match=r"sageattention 1\.0\.6 \(pip install 'perflow-blocks\[sage\]'\)"):
        get_attention_strategy("sage").require(CUDA, torch.float16, 64)
    with pytest.raises(ValueError, match="'sage' runs on cuda, and the model is on cpu; move the model, or choose"):
        get_attention_strategy("sage").require(CPU, torch.float16, 64)


@pytest.mark.parametrize("release", ["1.0.5", "2.1.1"])
def test_releases_that_cannot_be_called_are_refused(
    own_names: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    install_sage(monkeypatch, tmp_path, release)  # of 2.1.1 one that diffusers could not import
    with pytest.raises(ImportError, match=rf"sageattention 1\.0\.6 .*installed: {release}"):
        sage_on_cpu().require(CPU, torch.float16, 64)


@pytest.mark.behaviour
def test_it_is_not_imported_before_it_is_required(
    own_names: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What fails without a GPU must not keep the package from being imported."""
    install_sage(monkeypatch, tmp_path, source="raise RuntimeError('0 active drivers')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import perflow_blocks.attention.strategies"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ValueError, match="'sage' does not run on cpu: 0 active drivers"):
        sage_on_cpu().require(CPU, torch.float16, 64)


@pytest.mark.behaviour
def test_the_second_release_goes_through_the_dispatcher(own_names: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def second(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        seen.append(settings)
        return attention(q, k, v).to(q.dtype) * 1.01

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
    monkeypatch.setattr(attention_dispatch, "sageattn", second)
    strategy = sage_on_cpu()
    strategy.require(CPU, torch.bfloat16, 64)
    seen.clear()
    inputs = half(keys=77)
    assert strategy.refuses(inputs[0], inputs[1], None) is None
    assert strategy.refuses(inputs[0], inputs[1], torch.zeros(1, 1, 1, 77)) == "takes no mask"
    query, key, _ = half(head_dim=160)
    assert strategy.refuses(query, key, None) is not None
    assert error(strategy(*inputs), *inputs) == pytest.approx(0.01, rel=0.1)
    assert [settings["tensor_layout"] for settings in seen] == ["NHD"]
