"""What rounding lost when deltas were added: sparse, compact, and on disk where it is much."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

IN_MEMORY = 16 * 2**20
"""Bytes of corrections that stay in memory; more go to a temporary file."""


@dataclass(frozen=True)
class Piece:
    """The correction of the rows `start` to `stop` of a weight, and where its parts lie in the store.

    Attributes:
        start, stop: rows, the first dimension.
        checksum: of the rows' bit patterns before any delta was added.
        offset: of the parts, in bytes; they follow one another: a bit for each value that says whether it was changed
            by rounding, a bit that says whether by -1, then positions (uint32) and values of those that were changed
            by more than 1 either way.
        plane: bytes of either row of bits; 0 where rounding changed nothing.
        large: how many values were changed by more than 1.
        width: bytes of a weight.
    """

    start: int
    stop: int
    checksum: int
    offset: int = 0
    plane: int = 0
    large: int = 0
    width: int = 0

    @property
    def size(self) -> int:
        """In bytes."""
        return 2 * self.plane + (4 + self.width) * self.large


class Corrections:
    """Corrections by weight and rows. A copy, also a pickled one, has its own store."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Piece]] = {}
        # Lives as long as this object; the file is nameless and goes with it.
        self._store = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)
        self._end = 0

    def __getstate__(self) -> dict[str, Any]:
        self._store.seek(0)
        return {"pieces": self._pieces, "store": self._store.read()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
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
        piece = Piece(start, stop, checksum, self._end, loss.plane, loss.large, loss.width)
        self._append(loss.data)
        self._pieces.setdefault(name, []).append(piece)
        return piece

    def take(self, other: Corrections, name: str) -> None:
        """Copies what `other` has of a weight."""
        for piece in other.pieces(name):
            moved = Piece(**{**vars(piece), "offset": self._end})
            self._append(other._read(piece))
            self._pieces.setdefault(name, []).append(moved)

    def loss(self, piece: Piece, like: Tensor) -> Tensor | None:
        """The `rounding_loss` of the rows, of the shape and on the device of `like`; None where all are zero."""
        if not piece.plane:
            return None
        data = np.frombuffer(self._read(piece), np.uint8)
        changed, negative, rest = np.split(data, [piece.plane, 2 * piece.plane])
        bits = [np.unpackbits(plane, count=like.numel()).view(np.int8) for plane in (changed, negative)]
        dense = (bits[0] - 2 * bits[1]).astype(f"i{piece.width}")
        positions, values = np.split(rest, [4 * piece.large])
        dense[positions.view(np.uint32)] = values.view(dense.dtype)
        return torch.from_numpy(dense).view(like.shape).to(like.device)

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
    plane: int
    large: int
    width: int


def encode(loss: Tensor) -> Encoded:
    """A `rounding_loss`, integers of any shape; waits for the device.

    Most weights are off by one in their last bit or not at all, so that two bits each say it.
    """
    flat = loss.reshape(-1)
    near = flat.numpy() if flat.device.type == "cpu" else flat.clamp(-2, 2).to(torch.int8).cpu().numpy()
    changed = np.packbits(near != 0)
    if not changed.any():
        return Encoded(b"", 0, 0, loss.element_size())
    negative = np.packbits(near < 0)
    positions = np.flatnonzero((near > 1) | (near < -1))
    values = flat[torch.from_numpy(positions).to(flat.device)].cpu().numpy()
    data = b"".join(part.tobytes() for part in (changed, negative, positions.astype(np.uint32), values))
    return Encoded(data, len(changed), len(positions), loss.element_size())
