"""What a training shows of itself: losses and speed, kept on the device between two readings."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_files import atomic_path
from .layout import METRICS
from .step import StepLoss

WindowLosses = tuple[float | None, ...]
"""The mean loss of each window; None for one that had no row."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The updates since the last reading.

    Attributes:
        step: updates done.
        max_steps: updates in all.
        losses: weighted loss of each update since the last reading, over all processes.
        window_losses: unweighted loss of each window since then; None for a window that had no row.
        gradient_norms: before clipping, of each update.
        learning_rate: of the last update.
        samples_per_second: rows of all processes.
        eta_seconds: until the last update.
    """

    step: int
    max_steps: int
    losses: tuple[float, ...]
    window_losses: WindowLosses
    gradient_norms: tuple[float, ...]
    learning_rate: float
    samples_per_second: float
    eta_seconds: float

    @property
    def loss(self) -> float:
        """The mean of `losses`."""
        return sum(self.losses) / len(self.losses)

    def describe(self) -> str:
        """One line for a terminal."""
        windows = " ".join("-" if loss is None else f"{loss:.4g}" for loss in self.window_losses)
        eta = timedelta(seconds=round(self.eta_seconds))
        return (
            f"step {self.step}/{self.max_steps}  loss {self.loss:.4g}  windows {windows}  "
            f"lr {self.learning_rate:.3g}  {self.samples_per_second:.3g} samples/s  ETA {eta}"
        )

    def figures(self) -> dict[str, float]:
        """Numbers by name, for a tracker."""
        windows = {f"loss/window_{i}": loss for i, loss in enumerate(self.window_losses) if loss is not None}
        return {
            "loss": self.loss,
            **windows,
            "gradient_norm": self.gradient_norms[-1],
            "learning_rate": self.learning_rate,
            "samples_per_second": self.samples_per_second,
        }


class Meter:
    """Gathers what the updates give, as tensors, until it is read."""

    def __init__(self, accelerator: Any, max_steps: int) -> None:
        self._accelerator = accelerator
        self._max_steps = max_steps
        self._reset()

    def _reset(self) -> None:
        self._micro: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._micro_windows: list[Tensor] = []
        self._windows: list[Tensor] = []
        self._rows = 0
        self._since = time.perf_counter()

    @property
    def pending(self) -> int:
        """Updates that were not read yet."""
        return len(self._losses)

    def leave_out(self, seconds: float) -> None:
        """Takes time for other things, such as validation, out of the speed."""
        self._since += seconds

    def add(self, micro: StepLoss, rows: int) -> None:
        """Takes in a micro-step of this process."""
        self._micro.append(micro.loss.detach().float())
        self._micro_windows.append(torch.stack([micro.window_sums, micro.weighted_sums, micro.window_counts]))
        self._rows += rows

    def finish_update(self, gradient_norm: Tensor | float) -> None:
        """Ends an update, whose loss is the mean of its micro-steps."""
        self._losses.append(torch.stack(self._micro).mean())
        self._norms.append(torch.as_tensor(gradient_norm, dtype=torch.float32).to(self._losses[-1].device))
        self._windows.append(torch.stack(self._micro_windows).sum(0))
        self._micro, self._micro_windows = [], []

    def read(self, step: int, learning_rate: float) -> tuple[Progress, list[WindowLosses]]:
        """Waits for the device and all processes; the one place where losses are read.

        Returns:
            What is shown, and the weighted losses of each update, window by window.
        """
        windows = self._accelerator.reduce(torch.stack(self._windows), "sum")  # (updates, 3, windows)
        losses = self._accelerator.reduce(torch.stack(self._losses), "mean").tolist()
        norms = torch.stack(self._norms).tolist()
        sums, _, counts = windows.sum(0).tolist()
        updates = [_means(weighted, rows) for _, weighted, rows in windows.tolist()]
        seconds = time.perf_counter() - self._since
        rows = self._rows * self._accelerator.num_processes
        progress = Progress(
            step=step,
            max_steps=self._max_steps,
            losses=tuple(losses),
            window_losses=_means(sums, counts),
            gradient_norms=tuple(norms),
            learning_rate=learning_rate,
            samples_per_second=rows / seconds,
            eta_seconds=(self._max_steps - step) * seconds / len(losses),
        )
        self._reset()
        return progress, updates


def _means(sums: Sequence[float], counts: Sequence[float]) -> WindowLosses:
    return tuple(total / count if count else None for total, count in zip(sums, counts, strict=True))


class MetricsFile:
    """All readings of a training as JSON lines, for plots and for comparing runs; the main process writes it.

    Args:
        directory: of the output.
        step: from where the training goes on; readings beyond are of a run that was broken off, and go.
        name: of the file.
    """

    def __init__(self, directory: Path, step: int, name: str = METRICS) -> None:
        self._path = directory / name
        kept = [line for line in read_lines(self._path) if line["step"] <= step]
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def append(self, reading: Any) -> None:
        """Adds a dataclass that has a `step`."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(reading)) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a `MetricsFile` wrote; nothing where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
    return [json.loads(line) for line in complete.splitlines()]
