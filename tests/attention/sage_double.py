"""sageattention 1.0.6 as its caller sees it, on a CPU: `install_sage` installs this file under that name.

The parameters, the checks, the in-place change of the keys and the keys of score 0 that fill the last block are those
of the package; its error is that of scores from 8-bit numbers.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
calls: list[tuple[int, ...]] = []


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> Tensor:
    calls.append(tuple(q.shape))
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.size(-1) in (64, 96, 128)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if smooth_k:
        k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
    if tensor_layout == "NHD":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    scale = q.size(-1) ** -0.5 if sm_scale is None else sm_scale
    scores = _rounded(q) @ _rounded(k).mT * scale
    filled = torch.nn.functional.pad(scores, (0, -k.size(2) % BLOCK))
    weights = filled.softmax(-1)[..., : k.size(2)]
    result = (weights @ v.half().float()).to(q.dtype)
    return result.transpose(1, 2) if tensor_layout == "NHD" else result


def _rounded(tensor: Tensor) -> Tensor:
    step = tensor.float().abs().amax((-2, -1), keepdim=True) / 127
    return (tensor.float() / step).round() * step


def install_sage(monkeypatch: Any, directory: Path, release: str = "1.0.6", source: str | None = None) -> None:
    """Makes `sageattention` of this release importable: this file, or a source that fails when it is imported."""
    if source is None:
        shutil.copy(__file__, directory / "sageattention.py")
    else:
        (directory / "sageattention.py").write_text(source)
    metadata = directory / f"sageattention-{release}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: sageattention\nVersion: {release}\n")
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setitem(sys.modules, "sageattention", ModuleType("sageattention"))  # so that it goes again afterwards
    del sys.modules["sageattention"]
    if source is None:
        importlib.import_module("sageattention")


def installed_sage() -> ModuleType:
    """The module that the strategy imports, which is not this one."""
    return sys.modules["sageattention"]
