"""A plane cut into overlapping tiles and put together again."""

from __future__ import annotations

import pytest
import torch

from perflow_blocks.core.tiles import Tiling, cut_plane
from tests.conftest import generator

PLANES = [
    (40, 16, 16, 4),  # one axis is cut
    (16, 41, 16, 4),
    (23, 57, 16, 4),  # both, unevenly
    (31, 17, 16, 8),  # barely more than a tile; three tiles over one point
    (64, 50, 16, 0),  # no blending
    (9, 21, 10, 5),
    (4, 40, 16, 4),  # an axis no longer than the overlap
]
"""Height, width, size and overlap."""


def cut(height: int, width: int, size: int, overlap: int) -> Tiling:
    tiling = cut_plane(height, width, size, overlap)
    assert tiling is not None
    return tiling


def tile_weights(tiling: Tiling) -> torch.Tensor:
    """What each tile adds to the plane (tiles, height, width): the blend of tiles that differ in one channel each."""
    numbers = iter(torch.eye(len(tiling)))
    size = (tiling.rows.size, tiling.columns.size)
    return tiling.blend(lambda top, left: next(numbers)[:, None, None].expand(-1, *size))


@pytest.mark.parametrize("plane", PLANES)
def test_weights_are_a_partition_of_unity(plane: tuple[int, int, int, int]) -> None:
    tiling = cut(*plane)
    weights = tile_weights(tiling)
    assert weights.shape == (len(tiling), *plane[:2])
    assert weights.min() >= 0.0
    torch.testing.assert_close(weights.sum(0), torch.ones(plane[:2]), rtol=0, atol=3e-7)
    places = [(top, left) for top in tiling.rows.starts for left in tiling.columns.starts]
    for weight, (top, left) in zip(weights, places, strict=True):
        inside = torch.zeros(plane[:2])
        inside[top : top + tiling.rows.size, left : left + tiling.columns.size] = 1.0
        assert weight.sum() > 0
        assert torch.equal(weight * inside, weight)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_that_agree_give_exactly_what_they_agree_on(
    plane: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    tiling = cut(*plane)
    whole = torch.randn(2, 3, *plane[:2], generator=generator()).to(dtype)
    assert torch.equal(tiling.blend(lambda top, left: tiling.cut(whole, top, left)), whole)


@pytest.mark.parametrize(
    ("length", "size", "overlap", "starts"),
    [
        (16, 16, 4, (0,)),
        (17, 16, 4, (0, 1)),
        (28, 16, 4, (0, 12)),
        (29, 16, 4, (0, 6, 13)),
        (40, 16, 4, (0, 12, 24)),
        (32, 16, 0, (0, 16)),
        (10, 16, 4, (0,)),
    ],
)
def test_tiles_are_as_few_as_can_be_and_end_with_the_plane(
    length: int, size: int, overlap: int, starts: tuple[int, ...]
) -> None:
    axis = cut(length, 100, size, overlap).rows
    assert axis.starts == starts
    assert axis.starts[-1] + axis.size == length == axis.length
    assert all(axis.starts[k] + axis.size - axis.starts[k + 1] >= overlap for k in range(len(starts) - 1))


def test_a_plane_of_one_tile_is_not_cut() -> None:
    assert cut_plane(16, 16, 16, 4) is None
    assert cut_plane(7, 12, 16, 4) is None


def test_one_tile_fades_into_the_next_without_a_jump() -> None:
    weight = tile_weights(cut(16, 28, 16, 4))[1, 0]  # tiles at 0 and 12, so they share columns 12 to 15
    assert torch.equal(weight[:12], torch.zeros(12))
    assert torch.equal(weight[16:], torch.ones(12))
    assert (weight.diff() >= 0).all()
    assert weight.diff().max() < 0.4
    torch.testing.assert_close(weight + weight.flip(0), torch.ones(28))
    assert tile_weights(cut(16, 32, 16, 0))[1, 0].diff().max() == 1.0


def test_cut_takes_the_place_of_the_tile_at_any_resolution() -> None:
    tiling = cut(16, 28, 16, 4)
    image = torch.arange(48 * 84).reshape(1, 1, 48, 84)
    assert torch.equal(tiling.cut(image, 0, 12), image[..., 0:48, 36:84])
    assert tiling.scale(image) == 3
    assert tiling.scale(image[..., :83]) is tiling.scale(image[..., :47, :]) is None
    assert tiling.scale(torch.zeros(1, 1, 8, 14)) is None
