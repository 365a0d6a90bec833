"""One step of the distillation: from a window that the teacher solved to the student's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.distillation import make_student_example
from ..schedulers.pfode_solver import Conditioning
from .conditioning import cast
from .config import LossConfig
from .geometry import WindowGeometry
from .losses import row_losses, row_weights

UNet = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class WindowPairs:
    """Windows that the teacher solved, one a row.

    Attributes:
        z_start: where the window starts, (batch, channels, height, width) float32.
        z_end: where the teacher ended, likewise.
        index: number of the window, (batch,) long.
        conditioning: what the teacher was told, without the empty prompt of its guidance.
        uniform: numbers (batch,) in [0, 1) that decide the training times.
    """

    z_start: Tensor
    z_end: Tensor
    index: Tensor
    conditioning: Conditioning
    uniform: Tensor


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """What one micro-step gives; all tensors stay on the device.

    Attributes:
        loss: the weighted mean, a scalar with its graph.
        window_sums: sum of the unweighted row losses of each window, (windows,).
        weighted_sums: likewise of the weighted ones.
        window_counts: rows of each window, (windows,).
    """

    loss: Tensor
    window_sums: Tensor
    weighted_sums: Tensor
    window_counts: Tensor


def predict(student: UNet, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The student's output (batch, channels, height, width) at `timestep` (batch,), which is t T."""
    return student(sample, timestep, **cast(conditioning, sample.dtype).unet_kwargs(), return_dict=False)[0]


def distillation_step(student: UNet, pairs: WindowPairs, geometry: WindowGeometry, loss: LossConfig) -> StepLoss:
    """The student's loss at a time of each window, on the line between what the teacher made of it."""
    window = geometry.rows(pairs.index)
    t = geometry.times(window, pairs.uniform)
    prediction_type = geometry.config.prediction_type
    example = make_student_example(
        pairs.z_start,
        pairs.z_end,
        t,
        window,
        prediction_type,
        num_train_timesteps=geometry.num_train_timesteps,
    )
    output = predict(student, example.sample, example.timestep, pairs.conditioning)
    rows = row_losses(output, example.target, loss)
    weights = row_weights(window, pairs.index, t, prediction_type, loss)
    counts = torch.zeros(geometry.num_windows, device=rows.device)
    weighted = rows * weights
    return StepLoss(
        loss=weighted.mean(),
        window_sums=counts.index_add(0, pairs.index, rows.detach()),
        weighted_sums=counts.index_add(0, pairs.index, weighted.detach()),
        window_counts=counts.index_add(0, pairs.index, torch.ones_like(rows)),
    )
