"""Judges pictures of the demo's fine-tune: a base picture in a frame of the shape's colour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..demo.framed import FRAME_WIDTH
from ..demo.pictures import COLORS, Prompt
from .classifier import ShapeClassifier
from .judge import Verdicts, judge
from .pixels import CLEAN_SHARE, nearest_color, read_colors, share_near

_SEAM = 1  # pixels on either side of the frame's inner edge, which blend two colours


def judge_framed(pictures: Tensor, prompts: Sequence[Prompt], classifier: ShapeClassifier) -> Verdicts:
    """As `judge` for what is inside the frame, and the frame must be there, in the colour that the shape has.

    A picture without a frame is never accurate, whatever its prompt leaves open. A strict one has a clean frame too.

    Args:
        pictures: (count, 3, 64, 64) in [0, 1].
        prompts: what each was drawn from.
        classifier: recognises the shape; colours are read from the pixels.
    """
    inside = without_frame(pictures)
    verdicts = judge(inside, prompts, classifier)
    accurate, strict = [], []
    for picture, reading in zip(pictures.float() * 255.0, read_colors(inside), strict=True):
        frame = picture[:, _ring(picture, 0, FRAME_WIDTH - _SEAM)].T  # (pixels, 3)
        framed = reading.color is not None and nearest_color(frame.median(0).values, COLORS) == reading.color
        accurate.append(framed)
        strict.append(framed and share_near(frame, COLORS[str(reading.color)]) >= CLEAN_SHARE)
    return Verdicts(
        accurate=verdicts.accurate & torch.tensor(accurate),
        strict=verdicts.strict & torch.tensor(strict),
    )


def without_frame(pictures: Tensor) -> Tensor:
    """Pictures (count, 3, height, width) whose frame is painted over with the median colour of the rows beside it."""
    outer = FRAME_WIDTH + _SEAM
    beside = _ring(pictures, outer, outer + 3)
    background = pictures[..., beside].median(-1).values  # (count, 3)
    return torch.where(_ring(pictures, 0, outer), background[..., None, None], pictures)


def _ring(pictures: Tensor, start: int, end: int) -> Tensor:
    """Which pixels lie `start` to `end` (exclusive) pixels from the nearest edge, bool (height, width)."""
    height, width = pictures.shape[-2:]
    rows = torch.minimum(torch.arange(height), torch.arange(height).flip(0))
    columns = torch.minimum(torch.arange(width), torch.arange(width).flip(0))
    depth = torch.minimum(rows[:, None], columns[None, :])
    return (depth >= start) & (depth < end)
