"""Where windows start: at noised pictures (as published), or on the teacher's own trajectories from pure noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..core.distillation import marginal
from .buckets import TrainingBatch
from .conditioning import batch_time_ids
from .latents import LatentEncoder
from .randomness import generator_for
from .step import UNet, WindowPairs
from .teacher import Teacher


class PairSource(Protocol):
    """Gives the pairs of each micro-step; what it keeps between them can be saved."""

    def next(self, number: int, progress: float, student: UNet) -> WindowPairs:
        """The pairs of micro-step `number` of this process, `progress` in [0, 1) of the training done."""
        ...

    def save(self, directory: Path) -> None:
        """Writes what is kept, in files of this process."""
        ...

    def load(self, directory: Path) -> None:
        """Takes up what `save` wrote."""
        ...


class NoisedStarts:
    """Pictures, noised to the start of a random window each.

    Args:
        teacher: solves the windows.
        latents: encodes the pictures.
        batches: of pictures.
        seed: of the random numbers.
        process_index: of this process; each draws its own.
        caption_dropout: share of the prompts that become the empty one.
    """

    def __init__(
        self,
        teacher: Teacher,
        latents: LatentEncoder,
        batches: Iterator[TrainingBatch],
        *,
        seed: int,
        process_index: int,
        caption_dropout: float,
    ) -> None:
        self._teacher = teacher
        self._latents = latents
        self._batches = batches
        self._seed = seed
        self._process_index = process_index
        self._caption_dropout = caption_dropout

    @torch.no_grad()
    def next(self, number: int, progress: float, student: UNet) -> WindowPairs:
        generator = generator_for(self._seed, self._process_index, number)
        batch = next(self._batches)
        if batch.pixels is None:
            raise ValueError("the data has no pictures to noise; pass teacher.starts=trajectory, or pictures.")
        x0 = self._latents.encode(batch.pixels, generator)
        count, device, geometry = len(x0), x0.device, self._teacher.geometry
        noise = torch.randn(x0.shape, generator=generator).to(device)
        index = torch.randint(geometry.num_windows, (count,), generator=generator).to(device)
        uniform = torch.rand(count, generator=generator).to(device)
        drop = (torch.rand(count, generator=generator) < self._caption_dropout).tolist()
        window = geometry.rows(index)
        z_start = marginal(x0, noise, window.alpha_start)
        if geometry.config.zero_snr_start:
            z_start = _where(torch.as_tensor(window.start) >= 1.0, noise, z_start)
        encoder = self._teacher.encoder
        rows = encoder.dropped(encoder.rows(batch.prompts), drop)
        time_ids = batch_time_ids(encoder, batch)
        return WindowPairs(
            z_start=z_start,
            z_end=self._teacher.solve(z_start, window, rows, time_ids),
            index=index,
            conditioning=encoder.conditioning(rows, time_ids),
            uniform=uniform,
        )

    def save(self, directory: Path) -> None:
        """Nothing is kept."""

    def load(self, directory: Path) -> None:
        """Nothing is kept."""


def _where(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows[:, None, None, None], one, other)
