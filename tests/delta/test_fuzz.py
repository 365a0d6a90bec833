"""Broken files: every one is refused with a message that names it, and no model is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from perflow_blocks import merge_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.merge import merge_records

pytestmark = pytest.mark.behaviour

QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def model() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for i, tensor in enumerate(module.state_dict().values()):
        tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32).view_as(tensor) - i)
    return module


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    path = tmp_path / "good.safetensors"
    save_delta({name: torch.ones_like(tensor) for name, tensor in model().state_dict().items()}, path)
    return path.read_bytes()


def attempt(path: Path, content: bytes) -> str:
    """Merges; what was said, or "" if it was merged. A refusal leaves the model as it was."""
    module = model()
    path.write_bytes(content)
    try:
        merge_delta(module, path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert merge_records(module) == ()
        for name, tensor in model().state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name
        return str(error)
    for name, tensor in module.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    return ""


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "delta.safetensors"
    assert attempt(path, good) == ""
    for length in range(len(good)):
        assert "complete safetensors file" in attempt(path, good[:length]), length
    assert "not a complete" in attempt(path, good + b"x")


@given(changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=8))
@QUICK
def test_any_changed_bytes_are_merged_or_refused(tmp_path: Path, good: bytes, changes: list[tuple[int, int]]) -> None:
    content = bytearray(good)
    for at, value in changes:
        content[at % len(content)] = value
    attempt(tmp_path / "delta.safetensors", bytes(content))


def rewritten(content: bytes, change: Any) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        *(lambda header, kind=kind: header["0.bias"].update(dtype=kind) for kind in ("I16", "U16", "BOOL", "F99", 7)),
        lambda header: header["0.bias"].update(shape=[-3]),
        lambda header: header["0.bias"].update(data_offsets=[0, 2**63]),
        lambda header: header["0.bias"].pop("dtype"),
        lambda header: header.update(__metadata__={"a": 1}),
        lambda header: header.update(__metadata__={"perflow.num_time_windows": "many"}),
        lambda header: header.pop("0.bias"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path: Path, good: bytes, change: Any) -> None:
    assert attempt(tmp_path / "delta.safetensors", rewritten(good, change))
