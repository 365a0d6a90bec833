"""What merging a delta costs beside reading its file once, and how much memory it takes beside the model."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from perflow_blocks.components.delta_files import save_delta
from perflow_blocks.components.delta_merge import merge_delta, rescale_delta, unmerge_delta
from perflow_blocks.components.delta_record import merge_state

from .measure import Setting
from .report import Report, megabytes, table

STATUS = Path("/proc/self/status")
SDXL_WEIGHTS = 2_567_463_684


@dataclass(frozen=True)
class Size:
    """What is merged.

    Attributes:
        weights: how many, 2.57e9 for SDXL's UNet. Twice their bytes are needed on disk, and a little more in memory.
        dtype: of model and file.
        relative: standard deviation of dW, that of W being 1. PeRFlow's demo delta has 0.1.
    """

    weights: int = 320_000_000
    dtype: torch.dtype = torch.float16
    relative: float = 0.05


@dataclass(frozen=True)
class Measurement:
    """Seconds, and bytes beside the model; the file was out of the system's cache each time."""

    read: float
    merge: float
    rescale: float
    unmerge: float
    model_bytes: int
    largest_bytes: int
    peak_bytes: int
    correction_bytes: int
    exact: bool


def measure(size: Size) -> Measurement:
    """Merges, rescales and takes out a random delta of SDXL's mix of shapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        # In a process of its own, as memory that it gave back would hide what merging takes.
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(size, path))
        writer.start()
        writer.join()
        model = _weights(size, 1.0, seed=0)
        module = nn.ParameterDict(model).requires_grad_(False)
        before = _fingerprint(module)
        sizes = [parameter.nbytes for parameter in module.parameters()]
        read = min(_timed(path, lambda: _read(path)) for _ in range(3))
        with PeakMemory() as memory:
            merge = _timed(path, lambda: merge_delta(module, path))
        corrections = merge_state(module).corrections.size
        rescale = _timed(path, lambda: rescale_delta(module, 0.5))
        unmerge = _timed(path, lambda: unmerge_delta(module))
        exact = _fingerprint(module) == before
    return Measurement(read, merge, rescale, unmerge, sum(sizes), max(sizes), memory.peak, corrections, exact)


def _weights(size: Size, spread: float, seed: int) -> dict[str, torch.Tensor]:
    """Matrices, kernels and vectors in SDXL's proportions, of about the number of weights that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1280, 1280), (10240, 1280), (1280, 5120), (1280, 2048), (640, 640), (1280, 1280, 3, 3), (1280,)]
    weights: dict[str, torch.Tensor] = {}
    left = size.weights
    while left > 0:
        for shape in shapes:
            value = torch.empty(shape, dtype=size.dtype).normal_(std=0.02 * spread, generator=generator)
            weights[f"w{len(weights)}"] = value
            left -= value.numel()
    return weights


def _write(size: Size, path: Path) -> None:
    save_delta(_weights(size, size.relative, seed=1), path, dtype=size.dtype)


def _fingerprint(module: nn.Module) -> list[int]:
    return [int(tensor.view(-1).view(torch.int16).sum()) for tensor in module.state_dict().values()]


def _read(path: Path) -> None:
    buffer = bytearray(1 << 23)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _timed(path: Path, action: Callable[[], object]) -> float:
    """Seconds, with the file out of the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


class PeakMemory:
    """The most memory of the process beyond that at the start, without pages of mapped files."""

    def __enter__(self) -> PeakMemory:
        self._start, self.peak, self._done = _anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, _anonymous() - self._start)


def _anonymous() -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def why_not(setting: Setting) -> str | None:
    if not hasattr(os, "posix_fadvise") or not STATUS.is_file():
        return "it reads memory and drops files from the cache in Linux's way"
    if shutil.disk_usage(tempfile.gettempdir()).free < 4 * _size(setting).weights:
        return "there is no space for its file; set TMPDIR"
    return None


def run(setting: Setting) -> Report:
    size = _size(setting)
    found = measure(size)
    rows = {"reading the file": found.read, "merge": found.merge, "rescale": found.rescale, "unmerge": found.unmerge}
    kind = str(size.dtype).removeprefix("torch.")
    return Report(
        title="Merging a delta",
        parts=(
            f"{megabytes(found.model_bytes)} MB of {kind} weights on the CPU in SDXL's shapes (SDXL's UNet has "
            f"{megabytes(2 * SDXL_WEIGHTS)}), dW {size.relative:g} of W. One run; the file is read from disk "
            "each time.",
            table(
                ("what", "seconds", "times reading"),
                ((name, f"{seconds:.2f}", f"{seconds / found.read:.2f}") for name, seconds in rows.items()),
            ),
            f"Beside the model: {megabytes(found.peak_bytes)} MB of memory at most "
            f"({found.peak_bytes / found.model_bytes:.1%} of it; the largest tensor has "
            f"{megabytes(found.largest_bytes)} MB), and corrections for the way back, "
            f"{megabytes(found.correction_bytes)} MB ({found.correction_bytes / found.model_bytes:.1%}), in a "
            "temporary file beyond 16 MB.",
            f"Taken out, the weights are {'the same bit for bit' if found.exact else 'NOT the same'}.",
        ),
    )


def _size(setting: Setting) -> Size:
    return Size(weights=20_000_000) if setting.quick else Size()
