"""What rounding lost when deltas were added: sparse, compact, and on disk where it is much."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_BITS = 16
IN_MEMORY = 16 * 2**20
"""Bytes of corrections that stay in memory; more go to a temporary file."""


@dataclass(frozen=True)
class Piece:
    """The correction of the rows `start` to `stop` of a weight, and where its parts lie in the store.

    Attributes:
        start, stop: rows, the first dimension.
        checksum: of the rows' bit patterns before any delta was added.
        offset: of the parts, in bytes; they follow one another: how many corrections each block of 65,536 values has
            (uint32), their positions in the block (uint16), their values where they fit (int8), then positions
            (uint32) and values (int64) of those that do not.
        blocks, small, large: the numbers of blocks, of corrections, and of those that do not fit in 8 bits.
    """

    start: int
    stop: int
    checksum: int
    offset: int = 0
    blocks: int = 0
    small: int = 0
    large: int = 0

    @property
    def size(self) -> int:
        """In bytes."""
        return 4 * self.blocks + 3 * self.small + 12 * self.large


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

    def add(self, name: str, start: int, stop: int, checksum: int, loss: Tensor) -> None:
        """Takes note of `rounding_loss` of the rows, integers of any shape; waits for the device."""
        positions, values = _nonzero(loss)
        small = values.astype(np.int8)
        large = np.flatnonzero(small != values)
        blocks = -(-loss.numel() // (1 << BLOCK_BITS)) if len(positions) else 0
        counts = np.bincount(positions >> BLOCK_BITS, minlength=blocks).astype(np.uint32) if blocks else positions
        piece = Piece(start, stop, checksum, self._end, blocks, len(positions), len(large))
        parts = (
            counts,
            (positions & ((1 << BLOCK_BITS) - 1)).astype(np.uint16),
            small,
            positions[large].astype(np.uint32),
            values[large].astype(np.int64),
        )
        self._append(b"".join(part.tobytes() for part in parts))
        self._pieces.setdefault(name, []).append(piece)

    def take(self, other: Corrections, name: str) -> None:
        """Copies what `other` has of a weight."""
        for piece in other.pieces(name):
            moved = Piece(**{**vars(piece), "offset": self._end})
            self._append(other._read(piece))
            self._pieces.setdefault(name, []).append(moved)

    def loss(self, piece: Piece, like: Tensor) -> Tensor | None:
        """The integers that `add` was given, of the shape and on the device of `like`; None where all are zero."""
        if not piece.small:
            return None
        data, at = self._read(piece), 0
        arrays: list[np.ndarray[Any, Any]] = []
        for kind, count in (
            (np.uint32, piece.blocks),
            (np.uint16, piece.small),
            (np.int8, piece.small),
            (np.uint32, piece.large),
            (np.int64, piece.large),
        ):
            arrays.append(np.frombuffer(data, kind, count, at))
            at += arrays[-1].nbytes
        counts, low, small, large, large_values = arrays
        positions = (np.repeat(np.arange(piece.blocks, dtype=np.int64), counts) << BLOCK_BITS) | low
        dense = np.zeros(like.numel(), np.dtype(f"i{like.element_size()}"))
        dense[positions] = small
        dense[large] = large_values
        return torch.from_numpy(dense).view(like.shape).to(like.device)

    def _read(self, piece: Piece) -> bytes:
        self._store.seek(piece.offset)
        return self._store.read(piece.size)

    def _append(self, data: bytes) -> None:
        self._store.seek(self._end)
        self._store.write(data)
        self._end += len(data)


def _nonzero(loss: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the flattened tensor and values of what is not zero."""
    flat = loss.reshape(-1)
    if flat.device.type != "cpu":
        found = flat.nonzero().view(-1)
        return found.cpu().numpy(), flat[found].cpu().numpy()
    array = flat.numpy()
    positions = np.flatnonzero(array != 0)  # several times faster of booleans than of numbers
    return positions, array[positions]
