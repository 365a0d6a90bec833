"""A large plane cut into overlapping tiles of one size, and put together again without seams.

Every point of the result is a weighted mean of the pieces that cover it: where they agree, it is exactly that value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TileAxis:
    """How one axis of `length` is cut into tiles of `size` that begin at `starts`, from 0 to `length - size`.

    `fade` (len(starts), size), in [0, 1], is how far each tile replaces the ones before it.
    """

    length: int
    size: int
    starts: tuple[int, ...]
    fade: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiling:
    """How a plane is cut: a tile for each pair of `rows.starts` and `columns.starts`."""

    rows: TileAxis
    columns: TileAxis

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def scale(self, tensor: Tensor) -> int | None:
        """The integer k for which `tensor` has the size (..., k rows, k columns); None if there is none."""
        k = tensor.shape[-1] // self.columns.length
        fits = tuple(tensor.shape[-2:]) == (k * self.rows.length, k * self.columns.length)
        return k if fits and k > 0 else None

    def cut(self, tensor: Tensor, top: int, left: int) -> Tensor:
        """The tile at (top, left) of a tensor (..., k rows, k columns): a view (..., k size, k size)."""
        k = tensor.shape[-1] // self.columns.length
        return tensor.narrow(-2, k * top, k * self.rows.size).narrow(-1, k * left, k * self.columns.size)

    def blend(self, piece_at: Callable[[int, int], Tensor]) -> Tensor:
        """The plane (..., rows, columns) made of the pieces (..., size, size) of `piece_at(top, left)`, row by row."""
        bands = (
            _lay((piece_at(top, left) for left in self.columns.starts), self.columns, -1) for top in self.rows.starts
        )
        return _lay(bands, self.rows, -2)


def cut_plane(
    height: int, width: int, size: int, overlap: int, device: torch.device | str | None = None
) -> Tiling | None:
    """The fewest tiles of `size` by `size` that cover a plane, spread evenly; None if one tile covers it.

    Neighbours overlap by at least `overlap`, from 0 (not blended) to half of `size`. An axis shorter than a tile is
    not cut. `fade` is put on `device`.
    """
    if height <= size and width <= size:
        return None
    return Tiling(rows=_cut_axis(height, size, overlap, device), columns=_cut_axis(width, size, overlap, device))


def _cut_axis(length: int, size: int, overlap: int, device: torch.device | str | None) -> TileAxis:
    """Fades each tile in by half a cosine wave of length `overlap`, in the middle of where it overlaps the one before.

    The rest of a longer overlap is not used: it lies at a tile's border, where the network saw the least context.
    """
    size = min(size, length)
    slack = length - size
    gaps = math.ceil(slack / max(size - overlap, 1))
    starts = tuple(k * slack // gaps for k in range(1, gaps + 1))
    phase = (torch.arange(overlap, dtype=torch.float64) + 0.5) / max(overlap, 1)
    fade = torch.ones(gaps + 1, size, dtype=torch.float64)
    for k, (before, start) in enumerate(itertools.pairwise((0, *starts)), 1):
        begin = (before + size - start - overlap) // 2
        fade[k, :begin] = 0.0
        fade[k, begin : begin + overlap] = 0.5 - 0.5 * torch.cos(math.pi * phase)
    return TileAxis(length=length, size=size, starts=(0, *starts), fade=fade.float().to(device=device))


def _lay(pieces: Iterable[Tensor], axis: TileAxis, dim: int) -> Tensor:
    """The pieces, `axis.size` long in `dim` (-1 or -2), one over the other on a canvas `axis.length` long."""
    canvas: Tensor | None = None
    for piece, start, fade in zip(pieces, axis.starts, axis.fade, strict=True):
        if canvas is None:
            shape = list(piece.shape)
            shape[dim] = axis.length
            canvas = piece.new_zeros(shape)
        part = canvas.narrow(dim, start, axis.size)
        # lerp(a, b, 0) is a, lerp(a, b, 1) is b and lerp(a, a, w) is a, all to the bit.
        part.copy_(torch.lerp(part, piece, fade.to(piece.dtype).reshape(-1, *[1] * (-1 - dim))))
    assert canvas is not None
    return canvas
