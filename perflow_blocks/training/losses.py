"""The student's error in each row, and what each row counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from ..core.distillation import endpoint_weight
from ..core.parameterization import WindowAlpha
from .config import LossConfig

RECIPROCAL_FLOOR = 0.1
"""The least 1 - t that "reciprocal" divides by."""
_RECIPROCAL_MEAN = 1.0 - math.log(RECIPROCAL_FLOOR)  # of 1 / max(1 - t, floor) over t in [0, 1], for a floor of 0.1


def row_losses(output: Tensor, target: Tensor, loss: LossConfig) -> Tensor:
    """The mean loss of each row, (batch,) float32, not weighted."""
    output, target = output.float(), target.float()
    match loss.kind:
        case "l2":
            errors = (output - target).square()
        case "huber":
            errors = huber_loss(output, target, reduction="none", delta=loss.huber_c)
    return errors.flatten(1).mean(1)


def row_weights(window: WindowAlpha, index: Tensor, t: Tensor, prediction_type: str, loss: LossConfig) -> Tensor:
    """What each row counts, (batch,) float32.

    Args:
        window: of each row.
        index: its number, (batch,).
        t: the time at which the student is asked, (batch,).
        prediction_type: the student's.
        loss: names the weighting.
    """
    match loss.weighting:
        case "none":
            return torch.ones_like(t)
        case "reciprocal":
            return 1.0 / (1.0 - t).clamp(min=RECIPROCAL_FLOOR) / _RECIPROCAL_MEAN
        case "endpoint":
            return endpoint_weight(window, prediction_type, maximum=loss.max_weight)
        case "window":
            return torch.tensor(loss.window_weights, dtype=torch.float32).to(t.device, non_blocking=True)[index]
