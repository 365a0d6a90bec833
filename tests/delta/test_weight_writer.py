"""Writing weights tensor by tensor."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.recipe import DeltaRecipe


class OneAtATime(dict[str, Tensor]):
    """Fails when a tensor is asked for while the one before is still held."""

    before: weakref.ref[Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        assert self.before is None or self.before() is None
        values = super().__getitem__(name).numpy().copy()
        self.before = weakref.ref(values)  # what holds the memory, which views of the tensor keep alive
        return torch.from_numpy(values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "ä.turned": torch.arange(6.0).reshape(2, 3).T,
        "odd": torch.randn(3, generator=torch.Generator().manual_seed(0)),
    }
    path = tmp_path / "deep" / "file.safetensors"
    save_delta(OneAtATime(tensors), path, DeltaRecipe(base_model="é"), dtype)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "perflow.base_model": "é"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize(
    ("tensors", "dtype", "message"),
    [
        ({"a": torch.tensor([1e6])}, torch.float16, r"not finite as torch.float16 \(a\)"),
        ({"a": torch.ones(2)}, torch.int8, "dtype=torch.int8"),
    ],
)
def test_what_cannot_be_stored_leaves_the_old_file(
    tmp_path: Path, tensors: dict[str, Tensor], dtype: torch.dtype, message: str
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        save_delta(tensors, path, dtype=dtype)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
