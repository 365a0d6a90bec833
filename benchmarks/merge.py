"""What merging a delta costs beside reading its file once, and how much memory it takes beside the model."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.merge import merge_delta, rescale_delta, unmerge_delta

from .measure import Setting, Timing
from .report import Report, megabytes, table

STATUS = Path("/proc/self/status")
MEMORY = Path("/proc/meminfo")
SDXL_WEIGHTS = 2_567_463_684


@dataclass(frozen=True)
class Size:
    """What is merged.

    Attributes:
        weights: how many. Their bytes are needed three times in memory, with the system's cache of the files, and
            twice on disk.
        dtype: of model and file.
        relative: standard deviation of dW, that of W being 1. PeRFlow's demo delta has 0.1.
        width: of most layers, the others being multiples of it or halves.
    """

    weights: int = SDXL_WEIGHTS
    dtype: torch.dtype = torch.float16
    relative: float = 0.05
    width: int = 1280


@dataclass(frozen=True)
class Measurement:
    """Times, and bytes beside the model; the delta's file was out of the system's cache each time."""

    times: dict[str, Timing]
    model_bytes: int
    largest_bytes: int
    peak_bytes: int
    exact: bool


READING = "reading the file"


def measure(size: Size, rounds: int) -> Measurement:
    """Reads the file of a random delta of SDXL's mix of shapes, merges it, rescales it and takes it out, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        delta, base = Path(folder) / "delta.safetensors", Path(folder) / "base.safetensors"
        # In a process of its own, as memory that it gave back would hide what merging takes.
        files = {delta: (size.relative, 1), base: (1.0, 0)}
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(size, files))
        writer.start()
        writer.join()
        module = nn.ParameterDict(_weights(size, 1.0, seed=0)).requires_grad_(False)
        before = _fingerprint(module)
        sizes = [parameter.nbytes for parameter in module.parameters()]
        seconds: dict[str, list[float]] = {}
        peak = 0

        def timed(what: str, action: Callable[[], object], cold: Sequence[Path] = (delta,)) -> None:
            nonlocal peak
            with PeakMemory() as memory:
                seconds.setdefault(what, []).append(_timed(cold, action))
            peak = max(peak, memory.peak)

        for _ in tqdm(range(rounds), desc="merging", unit="round"):
            timed(READING, lambda: _read(delta))
            _read(base)  # as by loading the model
            timed("merge", lambda: merge_delta(module, delta, base=base))
            timed("rescale", lambda: rescale_delta(module, 0.5))
            timed("unmerge", lambda: unmerge_delta(module))
            timed("merge, base from disk", lambda: merge_delta(module, delta, base=base), (delta, base))
            unmerge_delta(module)
            timed("merge without a base", lambda: merge_delta(module, delta))
            unmerge_delta(module, base=base)
        exact = _fingerprint(module) == before
    times = {name: Timing(tuple(values)) for name, values in seconds.items()}
    return Measurement(times, sum(sizes), max(sizes), peak, exact)


def _weights(size: Size, spread: float, seed: int) -> dict[str, torch.Tensor]:
    """Matrices, kernels and vectors in SDXL's proportions, of about the number of weights that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    width, half, context = size.width, size.width // 2, 8 * size.width // 5
    shapes: list[tuple[int, ...]] = [
        (width, width),
        (8 * width, width),
        (width, 4 * width),
        (width, context),
        (half, half),
    ]
    shapes += [(width, width, 3, 3), (width,)]
    weights: dict[str, torch.Tensor] = {}
    left = size.weights
    while left > 0:
        for shape in shapes:
            value = torch.empty(shape, dtype=size.dtype).normal_(std=0.02 * spread, generator=generator)
            weights[f"w{len(weights)}"] = value
            left -= value.numel()
    return weights


def _write(size: Size, files: Mapping[Path, tuple[float, int]]) -> None:
    """Writes each file with weights of the spread and the seed that stand beside it."""
    for path, (spread, seed) in files.items():
        save_delta(_weights(size, spread, seed), path, dtype=size.dtype)


def _fingerprint(module: nn.Module) -> list[int]:
    return [int(tensor.view(-1).view(torch.int16).sum()) for tensor in module.state_dict().values()]


def _read(path: Path) -> None:
    buffer = bytearray(1 << 23)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _timed(cold: Sequence[Path], action: Callable[[], object]) -> float:
    """Seconds, with these files out of the system's cache."""
    for path in cold:
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
    if shutil.disk_usage(tempfile.gettempdir()).free < 5 * _size(setting).weights:
        return "there is no space for its files; set TMPDIR"
    return None


def run(setting: Setting) -> Iterator[Report]:
    size = _size(setting)
    found = measure(size, setting.rounds(5))
    read = found.times[READING].median
    kind = str(size.dtype).removeprefix("torch.")
    yield Report(
        title="Merging a delta",
        parts=(
            f"{megabytes(found.model_bytes)} MB of {kind} weights on the CPU in SDXL's shapes (SDXL's UNet has "
            f"{megabytes(2 * SDXL_WEIGHTS)}), dW {size.relative:g} of W. All take turns. The delta's file is read "
            f"from disk each time, at {found.model_bytes / read / 1e9:.1f} GB/s; the base's, unless the table says "
            "otherwise, from the system's cache, where loading the model has left it.",
            table(
                ("what", "seconds, median", "from", "to", "times reading"),
                (
                    (
                        name,
                        *(f"{value:.2f}" for value in (timing.median, min(timing.seconds), max(timing.seconds))),
                        f"{timing.median / read:.2f}",
                    )
                    for name, timing in found.times.items()
                ),
            ),
            f"Beside the model: {megabytes(found.peak_bytes)} MB of memory at most "
            f"({found.peak_bytes / found.model_bytes:.1%}). The largest tensor has {megabytes(found.largest_bytes)} "
            "MB.",
            f"Taken out, the weights are {'the same bit for bit' if found.exact else 'NOT the same'}.",
        ),
    )


def _size(setting: Setting) -> Size:
    if setting.quick:
        return Size(weights=1_000_000, width=80)
    return Size() if _available() > 3 * 2 * SDXL_WEIGHTS else Size(weights=SDXL_WEIGHTS // 8)


def _available() -> int:
    """Bytes of memory that programs can still get."""
    lines = MEMORY.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
