"""A merge that is interrupted or fails leaves every weight as it was, or says that it could not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perflow_blocks.delta import files as weight_files
from perflow_blocks.delta import rewrite as delta_rewrite
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.merge import merge_delta, unmerge_delta
from perflow_blocks.delta.record import merge_record
from perflow_blocks.delta.reversible import Scratch, add
from perflow_blocks.delta.tensors import extract_delta
from tests.delta.test_delta import assert_same, network, values


@pytest.fixture
def delta_file(tmp_path: Path) -> Path:
    path = tmp_path / "delta.safetensors"
    save_delta(extract_delta(network(1), network(0)), path, dtype=torch.float32)
    return path


@pytest.mark.parametrize("chunks", [0, 1, 5])
@pytest.mark.parametrize("stop", ["before", "after"])
@pytest.mark.parametrize("reread", [False, True])
def test_an_interrupted_merge_leaves_no_trace(
    delta_file: Path, monkeypatch: pytest.MonkeyPatch, chunks: int, stop: str, reread: bool
) -> None:
    """Wherever it is interrupted: while a sum is formed, or as soon as it was written."""
    monkeypatch.setattr(weight_files, "CHUNK", 40)  # several to a tensor
    model = network(0, dtype=torch.float16)
    before, done = values(model), []

    class Interrupting(list[Any]):
        def append(self, entry: Any) -> None:
            if stop == "after" and len(self) == chunks:
                raise KeyboardInterrupt
            super().append(entry)

    def interrupted(weight: Tensor, change: Tensor, scratch: Scratch, out: Tensor | None = None) -> Tensor:
        done.append(weight)
        if stop == "before" and len(done) == chunks + 1:
            raise KeyboardInterrupt
        result = add(weight, change, scratch, out)
        if stop == "after" and len(done) == chunks + 1 and out is not None:
            raise KeyboardInterrupt
        return result

    class Watched(delta_rewrite._Rewrite):
        def run(self) -> None:
            self._done = Interrupting()
            super().run()

    with monkeypatch.context() as patch:
        patch.setattr(delta_rewrite, "add", interrupted)
        patch.setattr(delta_rewrite, "_Rewrite", Watched)
        with pytest.raises(KeyboardInterrupt):
            merge_delta(model, delta_file, base=before if reread else None)
    assert done and merge_record(model) is None
    assert_same(model, before)
    merge_delta(model, delta_file)
    unmerge_delta(model)
    assert_same(model, before)


def test_a_model_that_cannot_be_put_back_is_known_to_be_broken(
    delta_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> Tensor:
        raise RuntimeError("the device is gone")

    model = network(0)
    merge_delta(model, delta_file)
    with monkeypatch.context() as patch:
        patch.setattr(delta_rewrite._Rewrite, "undo", failing)
        patch.setattr(delta_rewrite, "restore", failing)
        with pytest.raises(ValueError, match=r"could not be put back \(RuntimeError\('the device is gone'\)\); load"):
            unmerge_delta(model)
    for use in (lambda: merge_delta(model, delta_file), lambda: unmerge_delta(model)):
        with pytest.raises(ValueError, match="load the model again"):
            use()


def test_nothing_is_merged_after_a_second_interrupt(delta_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the thread that computes is waited for, which goes on for a while."""
    monkeypatch.setattr(weight_files, "CHUNK", 40)
    model = network(0, dtype=torch.float16)
    before, go_on, computing = values(model), threading.Event(), threading.Event()
    names: list[str] = []
    checksum, join = delta_rewrite.checksum, threading.Thread.join

    def slow(tensor: Tensor) -> int:
        names.append("checksum")
        if len(names) == 2:
            computing.set()
            assert go_on.wait(10)
        return checksum(tensor)

    def first(*args: Any) -> None:
        assert computing.wait(10)
        raise KeyboardInterrupt

    def second(thread: threading.Thread, timeout: float | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        join(thread, timeout)

    threads: list[threading.Thread] = []
    with monkeypatch.context() as patch:
        patch.setattr(delta_rewrite, "checksum", slow)
        patch.setattr(delta_rewrite._Rewrite, "_write", first)
        patch.setattr(threading.Thread, "join", second)
        with pytest.raises(KeyboardInterrupt):
            merge_delta(model, delta_file, base=before)
        threads += [thread for thread in threading.enumerate() if thread.name == "computed_ahead"]
        assert threads
        assert_same(model, before)
        go_on.set()
        for thread in threads:
            join(thread, 10)
    assert not any(thread.is_alive() for thread in threads)
    assert_same(model, before)
    merge_delta(model, delta_file)
    unmerge_delta(model)
    assert_same(model, before)


def test_a_model_is_broken_if_putting_it_back_is_interrupted(
    delta_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    model = network(0)
    with monkeypatch.context() as patch:
        patch.setattr(delta_rewrite._Rewrite, "undo", interrupted)
        patch.setattr(delta_rewrite, "add", interrupted)
        with pytest.raises(ValueError, match=r"could not be put back \(KeyboardInterrupt\(\)\); load the model"):
            merge_delta(model, delta_file)
    with pytest.raises(ValueError, match="load the model again"):
        merge_delta(model, delta_file)


def test_no_room_for_corrections_leaves_no_trace(delta_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(0, dtype=torch.float16)
    before, calls = values(model), []

    def full(self: delta_rewrite.Corrections, data: bytes) -> None:
        calls.append(data)
        if len(calls) > 2:
            raise OSError("No space left on device")
        append(self, data)

    append = delta_rewrite.Corrections._append
    monkeypatch.setattr(delta_rewrite.Corrections, "_append", full)
    with pytest.raises(ValueError, match=r"no room for what rounding lost .*set TMPDIR"):
        merge_delta(model, delta_file)
    assert merge_record(model) is None
    assert_same(model, before)
