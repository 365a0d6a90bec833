"""What attention kernels for GPUs take and need: their limits, packages, devices and downloads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from perflow_blocks.attention import hub_kernels
from perflow_blocks.attention.registry import attention_strategy_names, get_attention_strategy
from perflow_blocks.attention.strategy import AttentionConstraints
from tests.attention.conftest import CPU, CUDA, DTYPES, ON_CPU, tensors

HALF = (torch.float16, torch.bfloat16)
TABLE = [  # name, types, heads that are taken, heads that are not, mask, exact
    ("native_efficient", DTYPES, (8, 64, 160), (30,), True, True),
    ("native_cudnn", HALF, (64, 128), (36, 160), True, True),
    ("flash", HALF, (40, 64, 256), (257, 512), False, True),
    ("flash_3", HALF, (40, 64, 256), (36, 512), False, True),
    ("flash_hub", HALF, (40, 64, 256), (257, 512), False, True),
    ("flash_3_hub", HALF, (40, 64, 256), (36, 512), False, True),
    ("flash_4_hub", HALF, (64, 128), (36, 160), False, True),
    ("aiter_fa2_hub", (torch.bfloat16,), (64, 256), (512,), False, True),
    ("xformers", DTYPES, (40, 64, 160), (30, 512), False, True),
    ("sage", HALF, (64, 96, 128), (40, 160), False, False),
    ("sage_hub", HALF, (40, 64, 128), (160,), False, False),
    ("sage_blackwell_hub", HALF, (64, 128), (40, 96, 256), False, False),
]


@pytest.mark.behaviour
@pytest.mark.parametrize(("name", "dtypes", "taken", "refused", "mask", "exact"), TABLE)
def test_limits_of_kernels_for_gpus(
    name: str,
    dtypes: tuple[torch.dtype, ...],
    taken: tuple[int, ...],
    refused: tuple[int, ...],
    mask: bool,
    exact: bool,
) -> None:
    strategy = get_attention_strategy(name)

    def reason(head_dim: int = taken[-1], dtype: torch.dtype = dtypes[-1], **more: Any) -> str | None:
        shape = (2, 128, 8, head_dim)
        return strategy.supports(shape, shape, dtype, **{"device": CUDA, **more})

    assert strategy.exact == exact
    assert [reason(head_dim) for head_dim in taken] == [None] * len(taken)
    assert all(f"{name} takes heads of" in str(reason(head_dim)) for head_dim in refused)
    assert {dtype for dtype in DTYPES if reason(dtype=dtype) is None} == set(dtypes)
    assert reason(device=CPU) == f"{name} runs on cuda, not cpu"
    assert reason(mask=torch.zeros(1)) == (None if mask else f"{name} takes no mask")


INSTALLS = {
    name: "kernels >= 0.12,.*pip install 'kernels>=0.12'"
    for name in attention_strategy_names()
    if name.endswith("_hub")
} | {
    "flash": "flash-attn >= 2.6.3.*pip install 'perflow-blocks.flash.'",
    "flash_3": "the package flash_attn_interface.*build it.*'flash_3_hub'",
    "xformers": "xformers >= 0.0.29.*pip install 'perflow-blocks.xformers.'",
    "flash_4_hub": "kernels >= 0.12.3.*pip install 'kernels>=0.12.3'",
}


@pytest.mark.behaviour
@pytest.mark.parametrize("name", INSTALLS)
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_packages(monkeypatch, there=False)
    with pytest.raises(ImportError, match=f"^attention strategy '{name}' needs {INSTALLS[name]}") as caught:
        get_attention_strategy(name).require(CUDA, torch.float16, 64)
    assert "\n" not in str(caught.value)


def set_packages(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    """As if every package, or none, had been found when diffusers was imported."""
    for name in ("FLASH_ATTN", "FLASH_ATTN_3", "XFORMERS_ATTN", "SAGE_ATTN"):
        monkeypatch.setattr(attention_dispatch, f"_CAN_USE_{name}", there)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: there)
    monkeypatch.setattr(attention_dispatch, "is_kernels_version", lambda operation, version: there)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    set_packages(monkeypatch, there=True)


@pytest.mark.behaviour
@pytest.mark.parametrize("name", sorted(set(attention_strategy_names()) - set(ON_CPU) - {"sage"}))
def test_the_wrong_device_is_found_before_anything_is_fetched(
    packages: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(hub_kernels, "_maybe_download_kernel_for_backend", lambda backend: pytest.fail("downloads"))
    with pytest.raises(ValueError, match=f"'{name}' runs on cuda, and the model is on cpu; move the model, or choose"):
        get_attention_strategy(name).require(CPU, torch.float16, 64)


DEVICES = {  # what torch says of them: compute capability, and the version of ROCm
    "RTX 2080": ((7, 5), None),
    "A100": ((8, 0), None),
    "H100": ((9, 0), None),
    "RTX 5090": ((12, 0), None),
    "MI300": ((9, 4), "6.4"),
}
RUNS_ON = {
    "native_flash": {"A100", "H100", "RTX 5090", "MI300"},
    "native_efficient": set(DEVICES),
    "native_cudnn": {"A100", "H100", "RTX 5090"},
    "flash": {"A100", "H100", "RTX 5090", "MI300"},
    "flash_3": {"H100"},
    "flash_4_hub": {"H100", "RTX 5090"},
    "aiter_fa2_hub": {"MI300"},
    "sage_hub": {"A100", "H100", "RTX 5090"},
    "sage_blackwell_hub": {"RTX 5090"},
    "sage": {"A100", "H100", "RTX 5090", "MI300"},
}


@pytest.mark.parametrize("name", RUNS_ON)
def test_devices_are_told_apart(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    constraints, reasons = get_attention_strategy(name).constraints, {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, (capability, rocm) in DEVICES.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.version, "hip", rocm)
        reasons[device] = constraints.against_device(CUDA)
    assert {device for device, reason in reasons.items() if reason is None} == RUNS_ON[name]
    if name == "flash_3":
        assert reasons["A100"] == "needs compute capability 9.0, and cuda has 8.0"
        assert reasons["MI300"] == "runs on NVIDIA devices only"


def test_a_machine_without_cuda_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'native_cudnn' needs a CUDA device, and torch finds none"):
        get_attention_strategy("native_cudnn").require(CUDA, torch.float16, 64)


class _OnCpu(hub_kernels.FlashHubAttention):
    name = "flash_hub"
    constraints = AttentionConstraints(mask=False)


@pytest.mark.behaviour
def test_a_hub_kernel_is_fetched_when_it_is_required(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = attention_dispatch._HUB_KERNELS_REGISTRY[AttentionBackendName.FLASH_HUB]
    fetched: list[AttentionBackendName] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        return get_attention_strategy("native")(q, k, v)

    def download(backend: AttentionBackendName) -> None:
        fetched.append(backend)
        monkeypatch.setattr(entry, "kernel_fn", kernel)

    monkeypatch.setattr(hub_kernels, "_maybe_download_kernel_for_backend", download)
    strategy = _OnCpu()
    strategy.require(CPU, torch.float32, 64)
    inputs = tensors(77)
    assert torch.equal(strategy(*inputs), get_attention_strategy("native")(*inputs))
    assert fetched == [AttentionBackendName.FLASH_HUB]


def test_a_download_that_fails_is_named(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(backend: AttentionBackendName) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(hub_kernels, "_maybe_download_kernel_for_backend", download)
    with pytest.raises(ValueError, match="kernel kernels-community/flash-attn2 from the Hub: no route to host; check"):
        _OnCpu().require(CPU, torch.float32, 64)
