"""Samples that can be read in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from .batch import Size

StoredPicture = bytes | Path | Image.Image
"""A picture as it is kept: an encoded file in memory, a file, or drawn already."""


class Records(Protocol):
    """A data set of numbered samples. It is sent to worker processes, so it can be pickled."""

    size: Size | None
    """The size of every picture where it is the same for all (or there are none); None: headers have to be read."""

    def __len__(self) -> int: ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of a sample, of which one is drawn; none if it has none."""
        ...

    def picture(self, index: int) -> StoredPicture | None:
        """The picture of a sample; None in data without pictures.

        Raises:
            BadPicture: there should be one and there is none.
        """
        ...

    def describe(self) -> str:
        """What and where the data is, such as "folder /data/cats"."""
        ...


def as_captions(value: Any) -> tuple[str, ...]:
    """The texts in a caption field, a string or several, stripped and without empty ones."""
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence):
        return ()
    return tuple(text.strip() for text in value if isinstance(text, str) and text.strip())
