"""Guided teacher trajectories from pure noise through all windows: pairs on the path that sampling takes, no data.

A share of them is on-policy: its windows start where the student itself ended the one before, so that the teacher
shows how to go on from the student's own mistakes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.distillation import window_endpoint
from .buckets import Size, TrainingBatch
from .conditioning import batch_time_ids
from .config import TeacherConfig
from .families import LATENT_CHANNELS
from .randomness import generator_for
from .step import UNet, WindowPairs, predict
from .teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One prompt's windows: starts and ends (windows, channels, height, width), and what its prompt was."""

    starts: Tensor
    ends: Tensor
    prompt: str
    dropped: bool
    sizes: tuple[Size, Size, Size]


class TrajectoryStarts:
    """Trajectories in a buffer, which a new batch of them joins every so many micro-steps.

    Args:
        teacher: solves the windows.
        batches: prompts and sizes; pictures are not used.
        vae_factor: pixels per latent along a side.
        device: of the buffer.
        batch_size: pairs of a micro-step.
        seed: of the random numbers.
        process_index: of this process; each draws its own.
        caption_dropout: share of the prompts that become the empty one.
    """

    def __init__(
        self,
        teacher: Teacher,
        batches: Iterator[TrainingBatch],
        *,
        vae_factor: int,
        device: torch.device,
        batch_size: int,
        seed: int,
        process_index: int,
        caption_dropout: float,
    ) -> None:
        self._teacher = teacher
        self._batches = batches
        self._vae_factor = vae_factor
        self._device = device
        self._batch_size = batch_size
        self._seed = seed
        self._process_index = process_index
        self._caption_dropout = caption_dropout
        self._buffer: deque[Trajectory] = deque(maxlen=max(self._config.buffer_size, batch_size))

    @property
    def _config(self) -> TeacherConfig:
        return self._teacher.config

    def next(self, number: int, progress: float, student: UNet) -> WindowPairs:
        every = self._config.solve_every or self._teacher.geometry.num_windows
        if number % every == 0:
            share = self._config.on_policy_share if progress >= self._config.on_policy_from else 0.0
            generator = generator_for(self._seed, self._process_index, number, purpose=1)
            self._buffer.extend(self._solve(next(self._batches), share, student, generator))
        return self._draw(generator_for(self._seed, self._process_index, number))

    @torch.no_grad()
    def _solve(
        self, batch: TrainingBatch, on_policy_share: float, student: UNet, generator: torch.Generator
    ) -> list[Trajectory]:
        """Solves all windows for each of the prompts."""
        teacher, count = self._teacher, len(batch.prompts)
        geometry, encoder = teacher.geometry, teacher.encoder
        height, width = (side // self._vae_factor for side in batch.target_sizes[0])
        noise = torch.randn(count, LATENT_CHANNELS, height, width, generator=generator)
        drop = (torch.rand(count, generator=generator) < self._caption_dropout).tolist()
        on_policy = (torch.rand(count, generator=generator) < on_policy_share).to(self._device)
        rows = encoder.dropped(encoder.rows(batch.prompts), drop)
        time_ids = batch_time_ids(encoder, batch)
        starts, ends = [noise.to(self._device)], []
        for number in range(geometry.num_windows):
            window = geometry.rows(torch.full((count,), number, device=self._device))
            ends.append(teacher.solve(starts[-1], window, rows, time_ids))
            following = ends[-1]
            if number + 1 == geometry.num_windows:
                break
            if on_policy_share > 0:
                timestep = window.start * geometry.num_train_timesteps
                output = predict(student, starts[-1], torch.as_tensor(timestep), encoder.conditioning(rows, time_ids))
                own = window_endpoint(starts[-1], output, window, geometry.config.prediction_type)
                following = torch.where(on_policy[:, None, None, None], own.float(), following)
            starts.append(following)
        # (batch, windows, channels, height, width) each, laid out as they are when they are read from a file: the
        # layout decides how the UNet rounds.
        points = torch.stack(starts, 1).contiguous(), torch.stack(ends, 1).contiguous()
        sizes = zip(batch.original_sizes, batch.crop_tops_lefts, batch.target_sizes, strict=True)
        solved = zip(*points, batch.prompts, drop, sizes, strict=True)
        return [  # copies, so that a trajectory that stays does not keep its batch
            Trajectory(starts=start.clone(), ends=end.clone(), prompt=prompt, dropped=dropped, sizes=size)
            for start, end, prompt, dropped, size in solved
        ]

    def _draw(self, generator: torch.Generator) -> WindowPairs:
        """Random windows of random trajectories that have one size."""
        first = self._buffer[torch.randint(len(self._buffer), (1,), generator=generator).tolist()[0]]
        alike = [row for row in self._buffer if row.starts.shape == first.starts.shape]
        chosen = [alike[i] for i in torch.randint(len(alike), (self._batch_size,), generator=generator).tolist()]
        numbers = torch.randint(self._teacher.geometry.num_windows, (self._batch_size,), generator=generator)
        uniform = torch.rand(self._batch_size, generator=generator)
        encoder = self._teacher.encoder
        text = encoder.rows([row.prompt for row in chosen])
        text = encoder.dropped(text, [row.dropped for row in chosen])
        time_ids = encoder.time_ids(*zip(*(row.sizes for row in chosen), strict=True))
        picked = list(zip(chosen, numbers.tolist(), strict=True))
        return WindowPairs(
            z_start=torch.stack([row.starts[number] for row, number in picked]),
            z_end=torch.stack([row.ends[number] for row, number in picked]),
            index=numbers.to(self._device),
            conditioning=encoder.conditioning(text, time_ids),
            uniform=uniform.to(self._device),
        )

    def save(self, directory: Path) -> None:
        tensors = {
            f"{i}.{name}": getattr(row, name) for i, row in enumerate(self._buffer) for name in ("starts", "ends")
        }
        rows = [(row.prompt, row.dropped, row.sizes) for row in self._buffer]
        save_file(tensors, self._file(directory), metadata={"rows": json.dumps(rows)})

    def load(self, directory: Path) -> None:
        with safe_open(self._file(directory), "pt") as opened:  # on the host: it knows no device "cpu:0"
            rows = json.loads(opened.metadata()["rows"])
            self._buffer.clear()
            self._buffer.extend(
                Trajectory(
                    starts=opened.get_tensor(f"{i}.starts").to(self._device),
                    ends=opened.get_tensor(f"{i}.ends").to(self._device),
                    prompt=prompt,
                    dropped=dropped,
                    sizes=(tuple(sizes[0]), tuple(sizes[1]), tuple(sizes[2])),
                )
                for i, (prompt, dropped, sizes) in enumerate(rows)
            )

    def _file(self, directory: Path) -> Path:
        return directory / f"trajectories_{self._process_index}.safetensors"
