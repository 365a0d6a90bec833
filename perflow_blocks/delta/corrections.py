"""The way back from merged deltas: what rounding lost, compact and on disk where it is much, or where the base is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import Weights

IN_MEMORY = 16 * 2**20
"""Bytes of corrections that stay in memory; more go to a temporary file."""


GROUP = 4
"""Values that share a byte of codes."""

# Four codes of two bits as the low bits of four 16-bit numbers of one 64-bit number, and side by side in a byte: a
# product with the first constant has them in its bits 48 to 55, one with the second in their places.
_GATHER = np.uint64(sum(1 << (48 - 14 * i) for i in range(GROUP)))
_SPREAD = np.uint64(sum(1 << (14 * i) for i in range(GROUP)))
_LANES = np.uint64(sum(3 << (16 * i) for i in range(GROUP)))
_UNCHANGED = 0b01010101


@dataclass(frozen=True)
class Piece:
    """The way back for the rows `start` to `stop` of a weight: their correction, and where its parts lie in the store.

    Attributes:
        start, stop: rows, the first dimension.
        checksum: of the rows' bit patterns before any delta was added.
        offset: of the parts, in bytes; they follow one another: two bits for each value, a byte for each group of
            four, that say what rounding lost plus 1, then the numbers (uint32) and all values of the groups that two
            bits are not enough for.
        codes: bytes of the first part; 0 where rounding lost nothing.
        large: how many groups two bits are not enough for.
        width: bytes of a weight.
        reread: whether they are read again instead; then there is no correction.
    """

    start: int
    stop: int
    checksum: int
    offset: int = 0
    codes: int = 0
    large: int = 0
    width: int = 0
    reread: bool = False

    @property
    def size(self) -> int:
        """In bytes."""
        return self.codes + (4 + GROUP * self.width) * self.large


class Corrections:
    """Corrections by weight and rows. A copy, also a pickled one, has its own store.

    Attributes:
        base: where rows without any delta can be read again, under the model's names, or None; it holds what it holds.
    """

    def __init__(self, base: Weights | None = None) -> None:
        self.base = base
        self._pieces: dict[str, list[Piece]] = {}
        # Lives as long as this object; the file is nameless and goes with it.
        self._store = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)
        self._end = 0

    def __getstate__(self) -> dict[str, Any]:
        self._store.seek(0)
        return {"base": self.base, "pieces": self._pieces, "store": self._store.read()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["base"])  # type: ignore[misc]
        self._pieces = {name: list(pieces) for name, pieces in state["pieces"].items()}
        self._append(state["store"])

    @property
    def size(self) -> int:
        """In bytes, in memory and on disk together."""
        return self._end

    def pieces(self, name: str) -> list[Piece]:
        """How the weight `name` was divided; empty where no delta is in it."""
        return self._pieces.get(name, [])

    def names(self) -> Iterator[str]:
        return iter(self._pieces)

    def add(self, name: str, start: int, stop: int, checksum: int, loss: Encoded) -> Piece:
        """Takes note of the `rounding_loss` of the rows, encoded; returns where it is."""
        piece = Piece(start, stop, checksum, self._end, loss.codes, loss.large, loss.width)
        self._append(loss.data)
        return self.note(name, piece)

    def note(self, name: str, piece: Piece) -> Piece:
        """Takes note of the next rows of a weight."""
        self._pieces.setdefault(name, []).append(piece)
        return piece

    def take(self, other: Corrections, name: str) -> None:
        """Copies what `other` has of a weight."""
        for piece in other.pieces(name):
            moved = Piece(**{**vars(piece), "offset": self._end})
            self._append(other._read(piece))
            self.note(name, moved)

    def loss(self, piece: Piece, like: Tensor) -> Tensor | None:
        """The `rounding_loss` of the rows, of the shape and on the device of `like`; None where all are zero."""
        if not piece.codes:
            return None
        encoded = Encoded(self._read(piece), piece.codes, piece.large, piece.width)
        return torch.from_numpy(decode(encoded, like.numel())).view(like.shape).to(like.device)

    def _read(self, piece: Piece) -> bytes:
        self._store.seek(piece.offset)
        return self._store.read(piece.size)

    def _append(self, data: bytes) -> None:
        self._store.seek(self._end)
        self._store.write(data)
        self._end += len(data)


class Encoded(NamedTuple):
    """The parts of a `Piece` one after another, and its numbers of the same names."""

    data: bytes
    codes: int
    large: int
    width: int


def encode(loss: Tensor) -> Encoded:
    """A `rounding_loss`, contiguous integers of any shape, whose memory is used up; waits for the device."""
    values = loss.view(-1).cpu().numpy()
    if values.size % GROUP:
        values = np.concatenate([values, np.zeros(-values.size % GROUP, values.dtype)])
    values += 1
    large = np.flatnonzero((values.view(f"u{values.itemsize}") > 3).view(np.uint32) != 0)
    kept = values.reshape(-1, GROUP)[large] - values.dtype.type(1)
    # Codes of groups that have large values are not valid, and are not looked at.
    lanes = values.astype(np.uint16, copy=False).view(np.uint64)
    lanes *= _GATHER
    lanes >>= np.uint64(48)
    codes = lanes.astype(np.uint8)
    if not len(large) and (codes == _UNCHANGED).all():
        return Encoded(b"", 0, 0, values.itemsize)
    data = b"".join(part.data for part in (codes, large.astype(np.uint32), kept))
    return Encoded(data, len(codes), len(large), values.itemsize)


def decode(encoded: Encoded, count: int) -> NDArray[Any]:
    """The first `count` of the integers that were encoded, some of them not zero."""
    codes, groups, values = np.split(
        np.frombuffer(encoded.data, np.uint8), [encoded.codes, encoded.codes + 4 * encoded.large]
    )
    loss = (codes.astype(np.uint64) * _SPREAD & _LANES).view(np.int16).astype(f"i{encoded.width}", copy=False)
    loss -= 1
    loss.reshape(-1, GROUP)[groups.view(np.uint32)] = values.view(loss.dtype).reshape(-1, GROUP)
    return loss[:count]
