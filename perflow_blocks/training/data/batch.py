"""What the trainer gets from a data set: batches, and a source of them that knows its position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Size = tuple[int, int]
"""(height, width) in pixels; of a position, (top, left)."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Captions, the pictures they belong to, and what SDXL's time ids say about each picture.

    The three lists have an entry for each prompt: the picture's size before it was resized, where the crop begins in
    the resized (and, if so, mirrored) picture, and the size that was cut out, which is the same for the whole batch.
    """

    prompts: list[str]
    pixels: Tensor | None  # (batch, 3, height, width), float32 in [-1, 1]; None where there are prompts only
    original_sizes: list[Size]
    crop_tops_lefts: list[Size]
    target_sizes: list[Size]


class BatchSource(Protocol):
    """Endless epochs of batches for one process, with an exact position.

    `iter` goes on from the position, which moves when a batch is handed out, not when it is read ahead. Have one
    iterator at a time; after `load_state_dict` take a new one.
    """

    def __iter__(self) -> Iterator[TrainingBatch]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able. Each process saves and loads its own."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a position: the next batch is the one that an unbroken run would have had.

        Raises:
            ValueError: the position belongs to other data, or to another number of processes or batch size.
        """
        ...

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        ...

    @property
    def skipped(self) -> Counter[str]:
        """How many samples were left out so far, by reason; each counts once however often it is met."""
        ...

    @property
    def num_samples(self) -> int | None:
        """Usable samples of all processes together; None for what is read as a stream."""
        ...

    def describe(self) -> str:
        """One line for the log: what there is, what was left out."""
        ...
