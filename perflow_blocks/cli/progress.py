"""What a terminal shows of work that takes long; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Shows that something is going on."""
    with Console(stderr=True).status(what):
        yield
