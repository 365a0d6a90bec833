"""What rounding lost is kept in two bits for most values, and comes back as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perflow_blocks.delta.corrections import Corrections, Piece, decode, encode
from perflow_blocks.delta.rows import all_finite

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@st.composite
def losses(draw: st.DrawFn) -> torch.Tensor:
    width = draw(st.sampled_from(sorted(INTEGERS)))
    extremes = [-(1 << (8 * width - 1)), (1 << (8 * width - 1)) - 1]
    value = st.sampled_from([0, 0, 0, 1, -1, 2, -2, 3, 255, 256, -300, *extremes])
    return torch.tensor(draw(st.lists(value, min_size=1, max_size=70)), dtype=INTEGERS[width])


@given(losses())
def test_every_loss_comes_back(loss: torch.Tensor) -> None:
    expected = loss.numpy().copy()
    encoded = encode(loss)
    if not expected.any():
        assert encoded.data == b"" and encoded.codes == 0
        return
    assert len(encoded.data) == Piece(0, 1, 0, 0, encoded.codes, encoded.large, encoded.width).size
    decoded = decode(encoded, len(expected))
    assert decoded.dtype == expected.dtype and np.array_equal(decoded, expected)


def test_small_losses_take_two_bits() -> None:
    loss = torch.randint(-1, 3, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    assert len(encode(loss.clone()).data) == 1024
    loss[[5, 6, 99]] = 100
    assert len(encode(loss.clone()).data) == 1024 + 2 * (4 + 4 * 2)


def test_pieces_keep_their_shape_and_place() -> None:
    corrections = Corrections()
    kept = [torch.randint(-9, 9, (3, 5), generator=torch.Generator().manual_seed(i)).to(torch.int16) for i in (1, 2)]
    pieces = [corrections.add("w", 3 * i, 3 * i + 3, 0, encode(loss.clone())) for i, loss in enumerate(kept)]
    assert corrections.pieces("w") == pieces and corrections.size == sum(piece.size for piece in pieces)
    for piece, loss in zip(pieces, kept, strict=True):
        found = corrections.loss(piece, torch.empty(3, 5, dtype=torch.float16))
        assert found is not None and torch.equal(found, loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_value_that_is_not_finite_is_seen(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    finite = torch.tensor([largest, -largest, 0.0, -0.0, torch.finfo(dtype).tiny, 1.0], dtype=dtype)
    assert all_finite(finite) and all_finite(finite[:0]) and all_finite(finite[1:2])
    for value in (math.inf, -math.inf, math.nan, -math.nan):
        for place in range(len(finite)):
            broken = finite.clone()
            broken[place] = value
            assert not all_finite(broken), (value, place)
