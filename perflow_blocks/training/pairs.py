"""What the student is trained on, pairs of window ends from the teacher, and its loss on them.

Windows start at noised images, as published, or on the teacher's own trajectories from pure noise, which need prompts
only and train on the path that sampling takes. Of a share of the trajectories each window starts where the student
ended the one before, so that the teacher shows how to go on from the student's errors.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import huber_loss

from ..core.distillation import endpoint_weight, make_student_example, marginal, window_endpoint
from ..core.parameterization import WindowAlpha
from ..schedulers.pfode_solver import Conditioning
from .buckets import TrainingBatch
from .config import LossConfig
from .teacher import LatentEncoder, Sizes, Teacher, WindowGeometry, cast

UNet = Callable[..., Any]
RECIPROCAL_FLOOR = 0.1  # the least 1 - t that the "reciprocal" weighting divides by
_RECIPROCAL_MEAN = 1.0 - math.log(RECIPROCAL_FLOOR)  # of 1 / max(1 - t, floor) over t in [0, 1]


@dataclass(frozen=True, kw_only=True)
class WindowPairs:
    """Windows that the teacher solved, one a row."""

    z_start: Tensor  # where the window starts, (batch, channels, height, width) float32
    z_end: Tensor  # where the teacher ended, of the same shape
    index: Tensor  # number of the window, (batch,) long
    conditioning: Conditioning  # what the teacher was given for the prompts
    uniform: Tensor  # numbers (batch,) in [0, 1) that decide the training times


class StepLoss(NamedTuple):
    """What one micro-step gives; all tensors stay on the device."""

    loss: Tensor  # the weighted mean, a scalar with its graph
    window_sums: Tensor  # sum of the unweighted row losses of each window, (windows,)
    window_counts: Tensor  # rows of each window, (windows,)


def predict(student: UNet, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The student's output (batch, channels, height, width) at `timestep` (batch,), which is t T."""
    return student(sample, timestep, **cast(conditioning, sample.dtype).unet_kwargs(), return_dict=False)[0]


def distillation_step(student: UNet, pairs: WindowPairs, geometry: WindowGeometry, loss: LossConfig) -> StepLoss:
    """The student's loss at a time of each window, on the line between what the teacher made of it."""
    window = geometry.rows(pairs.index)
    t = geometry.times(window, pairs.uniform)
    kind, timesteps = geometry.config.prediction_type, geometry.num_train_timesteps
    example = make_student_example(pairs.z_start, pairs.z_end, t, window, kind, num_train_timesteps=timesteps)
    output = predict(student, example.sample, example.timestep, pairs.conditioning)
    rows = row_losses(output, example.target, loss)
    weights = row_weights(window, t, kind, loss)
    zeros = torch.zeros(geometry.num_windows, device=rows.device)
    return StepLoss(
        loss=(rows * weights).mean(),
        window_sums=zeros.index_add(0, pairs.index, rows.detach()),
        window_counts=zeros.index_add(0, pairs.index, torch.ones_like(rows)),
    )


def row_losses(output: Tensor, target: Tensor, loss: LossConfig) -> Tensor:
    """The mean loss of each row, (batch,) float32, not weighted."""
    output, target = output.float(), target.float()
    match loss.kind:
        case "l2":
            errors = (output - target).square()
        case "huber":
            errors = huber_loss(output, target, reduction="none", delta=loss.huber_c)
    return errors.flatten(1).mean(1)


def row_weights(window: WindowAlpha, t: Tensor, prediction_type: str, loss: LossConfig) -> Tensor:
    """What each row counts, (batch,) float32, by its window and the time t that was asked."""
    match loss.weighting:
        case "none":
            return torch.ones_like(t)
        case "reciprocal":
            return 1.0 / (1.0 - t).clamp(min=RECIPROCAL_FLOOR) / _RECIPROCAL_MEAN
        case "endpoint":
            return endpoint_weight(window, prediction_type, maximum=loss.max_weight)


def generator_for(seed: int, process_index: int, number: int, purpose: int = 0) -> torch.Generator:
    """A generator on the host for one micro-step of one process.

    A run that is resumed draws what an unbroken one would have, with no state to keep. Numbers come from the host,
    so that they are the same on every device.
    """
    state = np.random.SeedSequence([seed, process_index, number, purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def sizes_of(batch: TrainingBatch) -> list[Sizes]:
    return list(zip(batch.original_sizes, batch.crop_tops_lefts, batch.target_sizes, strict=True))


@dataclass(kw_only=True)
class PairSource:
    """Gives the pairs of each micro-step; what it keeps between them can be saved to a safetensors file."""

    teacher: Teacher
    batches: Iterator[TrainingBatch]
    seed: int
    process_index: int  # each process draws its own numbers
    caption_dropout: float

    def next(self, number: int, progress: float, student: UNet) -> WindowPairs:
        """The pairs of micro-step `number` of this process, `progress` in [0, 1) of the training done."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Writes what is kept, if anything."""

    def load(self, path: Path) -> None:
        """Takes up what `save` wrote."""


@dataclass(kw_only=True)
class NoisedStarts(PairSource):
    """Images, noised to the start of a random window each."""

    latents: LatentEncoder

    @torch.no_grad()
    def next(self, number: int, progress: float, student: UNet) -> WindowPairs:
        generator = generator_for(self.seed, self.process_index, number)
        batch = next(self.batches)
        assert batch.pixels is not None  # the settings allow no prompts alone
        x0 = self.latents.encode(batch.pixels, generator)
        count, device, geometry = len(x0), x0.device, self.teacher.geometry
        noise = torch.randn(x0.shape, generator=generator).to(device)
        index = torch.randint(geometry.num_windows, (count,), generator=generator).to(device)
        uniform = torch.rand(count, generator=generator).to(device)
        drop = (torch.rand(count, generator=generator) < self.caption_dropout).tolist()
        window = geometry.rows(index)
        z_start = marginal(x0, noise, window.alpha_start)
        if geometry.config.zero_snr_start:
            first = torch.as_tensor(window.start) >= 1.0
            z_start = torch.where(first[:, None, None, None], noise, z_start)
        conditioning = self.teacher.encoder.conditioning(batch.prompts, sizes_of(batch), drop)
        z_end = self.teacher.solve(z_start, window, conditioning)
        return WindowPairs(z_start=z_start, z_end=z_end, index=index, conditioning=conditioning, uniform=uniform)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One prompt's windows: starts and ends (windows, channels, height, width), and what its prompt was."""

    starts: Tensor
    ends: Tensor
    prompt: str
    dropped: bool
    sizes: Sizes


@dataclass(kw_only=True)
class TrajectoryStarts(PairSource):
    """Trajectories in a buffer, which a new batch of them joins every so many micro-steps; images are not used."""

    channels: int  # of latents
    vae_factor: int  # pixels per latent along a side
    device: torch.device  # of the buffer
    batch_size: int  # pairs of a micro-step

    def __post_init__(self) -> None:
        self.buffer = deque[Trajectory](maxlen=max(self.teacher.config.buffer_size, self.batch_size))

    def next(self, number: int, progress: float, student: UNet) -> WindowPairs:
        config = self.teacher.config
        every = config.solve_every or self.teacher.geometry.num_windows
        if number % every == 0:
            share = config.on_policy_share if progress >= config.on_policy_from else 0.0
            generator = generator_for(self.seed, self.process_index, number, purpose=1)
            self.buffer.extend(self._solve(next(self.batches), share, student, generator))
        return self._draw(generator_for(self.seed, self.process_index, number))

    @torch.no_grad()
    def _solve(
        self, batch: TrainingBatch, on_policy_share: float, student: UNet, generator: torch.Generator
    ) -> Iterator[Trajectory]:
        """Solves all windows for each of the prompts."""
        teacher, geometry, count = self.teacher, self.teacher.geometry, len(batch.prompts)
        height, width = (side // self.vae_factor for side in batch.target_sizes[0])
        noise = torch.randn(count, self.channels, height, width, generator=generator)
        drop = (torch.rand(count, generator=generator) < self.caption_dropout).tolist()
        on_policy = (torch.rand(count, generator=generator) < on_policy_share).to(self.device)
        conditioning = teacher.encoder.conditioning(batch.prompts, sizes_of(batch), drop)
        z, starts, ends = noise.to(self.device), [], []
        for window in geometry.each(count):
            starts.append(z)
            z = teacher.solve(z, window, conditioning)
            ends.append(z)
            if on_policy_share > 0 and len(ends) < geometry.num_windows:
                timestep = torch.as_tensor(window.start) * geometry.num_train_timesteps
                output = predict(student, starts[-1], timestep, conditioning)
                own = window_endpoint(starts[-1], output, window, geometry.config.prediction_type)
                z = torch.where(on_policy[:, None, None, None], own.float(), z)
        # (batch, windows, channels, height, width) each, laid out as they are when they are read from a file: the
        # layout decides how the UNet rounds.
        points = torch.stack(starts, 1).contiguous(), torch.stack(ends, 1).contiguous()
        for start, end, prompt, dropped, sizes in zip(*points, batch.prompts, drop, sizes_of(batch), strict=True):
            # Copies, so that a trajectory that stays does not keep its batch.
            yield Trajectory(starts=start.clone(), ends=end.clone(), prompt=prompt, dropped=dropped, sizes=sizes)

    def _draw(self, generator: torch.Generator) -> WindowPairs:
        """Random windows of random trajectories that have one size."""
        first = self.buffer[torch.randint(len(self.buffer), (1,), generator=generator).tolist()[0]]
        alike = [row for row in self.buffer if row.starts.shape == first.starts.shape]
        chosen = [alike[i] for i in torch.randint(len(alike), (self.batch_size,), generator=generator).tolist()]
        index = torch.randint(self.teacher.geometry.num_windows, (self.batch_size,), generator=generator)
        uniform = torch.rand(self.batch_size, generator=generator)
        picked = list(zip(chosen, index.tolist(), strict=True))
        return WindowPairs(
            z_start=torch.stack([row.starts[number] for row, number in picked]),
            z_end=torch.stack([row.ends[number] for row, number in picked]),
            index=index.to(self.device),
            conditioning=self.teacher.encoder.conditioning(
                [row.prompt for row in chosen], [row.sizes for row in chosen], [row.dropped for row in chosen]
            ),
            uniform=uniform.to(self.device),
        )

    def save(self, path: Path) -> None:
        tensors = {
            f"{i}.{name}": getattr(row, name) for i, row in enumerate(self.buffer) for name in ("starts", "ends")
        }
        rows = [(row.prompt, row.dropped, row.sizes) for row in self.buffer]
        save_file(tensors, path, metadata={"rows": json.dumps(rows)})

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as opened:  # on the host: it knows no device "cpu:0"
            self.buffer.clear()
            for i, (prompt, dropped, sizes) in enumerate(json.loads(opened.metadata()["rows"])):
                starts, ends = (opened.get_tensor(f"{i}.{name}").to(self.device) for name in ("starts", "ends"))
                self.buffer.append(Trajectory(starts=starts, ends=ends, prompt=prompt, dropped=dropped, sizes=sizes))
