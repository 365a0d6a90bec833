"""Reads colours back from a picture's pixels, with no model involved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..demo.pictures import BACKGROUNDS, COLORS, RGB

_BORDER = 3  # pixels at each edge that count as background
_FOREGROUND_DISTANCE = 50.0  # RGB distance from the background beyond which a pixel belongs to the shape
_MIN_FOREGROUND = 24  # pixels; the smallest shape has about 100
_FAR_FROM_PALETTE = 80.0  # a median colour farther than this from every named colour has no name
_CLEAN_DISTANCE = 45.0  # the jitter of rendered colours stays below 18
CLEAN_SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class PixelReading:
    """What the pixels of one picture say.

    `color` and `background` are the nearest names, None where nothing of the palette is near (or no shape is there).
    `clean` tells that at least three quarters of the shape's inner pixels and of the border have that colour, which a
    blend of two answers has not.
    """

    color: str | None
    background: str | None
    clean: bool


def read_colors(pictures: Tensor) -> list[PixelReading]:
    """Reads a batch of pictures, (batch, 3, height, width) in [0, 1]."""
    return [_read(picture) for picture in pictures.float() * 255.0]


def _read(picture: Tensor) -> PixelReading:
    border_mask = torch.ones(picture.shape[1:], dtype=torch.bool)
    border_mask[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    border = picture[:, border_mask].T  # (pixels, 3)
    background_color = border.median(0).values
    background = nearest_color(background_color, BACKGROUNDS)
    distance = (picture - background_color[:, None, None]).norm(dim=0)
    mask = _eroded(distance > _FOREGROUND_DISTANCE)
    if int(mask.sum()) < _MIN_FOREGROUND:
        return PixelReading(color=None, background=background, clean=False)
    shape = picture[:, mask].T
    color = nearest_color(shape.median(0).values, COLORS)
    clean = (
        color is not None
        and background is not None
        and share_near(shape, COLORS[color]) >= CLEAN_SHARE
        and share_near(border, BACKGROUNDS[background]) >= CLEAN_SHARE
    )
    return PixelReading(color=color, background=background, clean=clean)


def _eroded(mask: Tensor) -> Tensor:
    """The pixels whose four neighbours are set too: leaves out the blend at a shape's edge."""
    inner = mask.clone()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def nearest_color(color: Tensor, palette: Mapping[str, RGB]) -> str | None:
    """The name in `palette` nearest to a colour (3,) in [0, 255]; None where none is near."""
    distances = {
        name: float((color - torch.tensor(value, dtype=color.dtype)).norm()) for name, value in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= _FAR_FROM_PALETTE else None


def share_near(pixels: Tensor, color: RGB) -> float:
    """The share of pixels (count, 3) in [0, 255] that are near `color`, allowing for the jitter of renders."""
    distance = (pixels - torch.tensor(color, dtype=pixels.dtype)).norm(dim=1)
    return float((distance <= _CLEAN_DISTANCE).float().mean())
