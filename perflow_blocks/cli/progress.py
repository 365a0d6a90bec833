"""What a terminal shows of work that takes long; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..delta.files import Weights


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Shows that something is going on."""
    with Console(stderr=True).status(what):
        yield


@contextmanager
def read_with_bar(weights: Weights, what: str, passes: int = 1) -> Iterator[Weights]:
    """The same weights; a bar shows how many of their tensors have been read, all of them `passes` times."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=passes * len(weights.shapes))
        yield CountedWeights(weights, lambda: bar.advance(task), passes)


class CountedWeights(Weights):
    """Weights that say when a tensor is read for the first time, and again in each further pass over all of them."""

    def __init__(self, weights: Weights, count: Callable[[], Any], passes: int = 1) -> None:
        self._weights, self._count, self._left = weights, count, passes
        self._read: set[str] = set()
        self.label, self.shapes, self.metadata = weights.label, weights.shapes, weights.metadata

    def tensor(self, name: str) -> Tensor:
        if self._left and name not in self._read:
            self._read.add(name)
            self._count()
            if len(self._read) == len(self.shapes):
                self._read = set()
                self._left -= 1
        return self._weights.tensor(name)

    def require_unchanged(self) -> None:
        self._weights.require_unchanged()

    def stamp(self) -> tuple[Any, ...] | None:
        return self._weights.stamp()
