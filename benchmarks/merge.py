"""What merging a delta costs beside reading its file once, and how much memory it takes beside the model."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import sys
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
from perflow_blocks.components.files import atomic_path

RESULTS = Path(__file__).parent / "results" / "merge.md"
SDXL_WEIGHTS = 2_567_463_684


@dataclass(frozen=True)
class Setting:
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


def run(setting: Setting) -> Measurement:
    """Merges, rescales and takes out a random delta of SDXL's mix of shapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        # In a process of its own, as memory that it gave back would hide what merging takes.
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(setting, path))
        writer.start()
        writer.join()
        model = _weights(setting, 1.0, seed=0)
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


def _weights(setting: Setting, spread: float, seed: int) -> dict[str, torch.Tensor]:
    """Matrices, kernels and vectors in SDXL's proportions, of about the number of weights that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1280, 1280), (10240, 1280), (1280, 5120), (1280, 2048), (640, 640), (1280, 1280, 3, 3), (1280,)]
    weights: dict[str, torch.Tensor] = {}
    left = setting.weights
    while left > 0:
        for shape in shapes:
            value = torch.empty(shape, dtype=setting.dtype).normal_(std=0.02 * spread, generator=generator)
            weights[f"w{len(weights)}"] = value
            left -= value.numel()
    return weights


def _write(setting: Setting, path: Path) -> None:
    save_delta(_weights(setting, setting.relative, seed=1), path, dtype=setting.dtype)


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
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def table(setting: Setting, found: Measurement) -> list[str]:
    """The measurement as Markdown."""
    kind, megabytes = str(setting.dtype).removeprefix("torch."), 2**20
    rows = {"reading the file": found.read, "merge": found.merge, "rescale": found.rescale, "unmerge": found.unmerge}
    return [
        "# Merging a delta",
        "",
        f"{found.model_bytes / megabytes:.0f} MB of {kind} weights in SDXL's shapes (SDXL has "
        f"{2 * SDXL_WEIGHTS / megabytes:.0f}), dW {setting.relative:g} of W; the file is read from disk each time.",
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
        "| what | seconds | times reading |",
        "|---|---|---|",
        *(f"| {name} | {seconds:.2f} | {seconds / found.read:.2f} |" for name, seconds in rows.items()),
        "",
        f"Beside the model: {found.peak_bytes / megabytes:.0f} MB of memory at most "
        f"({found.peak_bytes / found.model_bytes:.1%} of it; the largest tensor has "
        f"{found.largest_bytes / megabytes:.0f} MB), and corrections for the way back, "
        f"{found.correction_bytes / megabytes:.0f} MB ({found.correction_bytes / found.model_bytes:.1%}), "
        "in a temporary file beyond 16 MB.",
        f"Taken out, the weights are {'the same bit for bit' if found.exact else 'NOT the same'}.",
    ]


def main() -> None:
    setting = Setting()
    if shutil.disk_usage(tempfile.gettempdir()).free < 4 * setting.weights:
        raise SystemExit("not enough space for the benchmark's file; set TMPDIR.")
    lines = table(setting, run(setting))
    with atomic_path(RESULTS) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
