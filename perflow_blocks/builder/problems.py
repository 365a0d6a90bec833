"""Mistakes are collected, so that a user reads all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Problems:
    """One sentence for each mistake, in the order in which they were found; the same one is kept once."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    def add(self, sentence: str) -> None:
        self._found[sentence] = None

    @contextmanager
    def noted(self, *kinds: type[Exception], about: str = "") -> Iterator[None]:
        """Turns an error that ends the block into a problem: ValueError, ImportError, OSError, and further `kinds`."""
        caught: tuple[type[Exception], ...] = (ValueError, ImportError, OSError, *kinds)
        try:
            yield
        except caught as error:
            self.add(f"{about}{error}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)
