"""What a terminal shows of work that takes long; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..delta.files import RenamedWeights, Weights


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Shows that something is going on."""
    with Console(stderr=True).status(what):
        yield


@contextmanager
def read_with_bar(weights: Weights, what: str) -> Iterator[Weights]:
    """The same weights; a bar shows how many of their tensors have been read."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=len(weights.shapes))
        yield CountedWeights(weights, lambda: bar.advance(task))


class CountedWeights(RenamedWeights):
    """Weights that say when a tensor is read for the first time."""

    def __init__(self, weights: Weights, count: Callable[[], Any]) -> None:
        super().__init__(weights, {name: name for name in weights.shapes})
        self._count, self._read = count, set[str]()

    def tensor(self, name: str) -> Tensor:
        if name not in self._read:
            self._read.add(name)
            self._count()
        return super().tensor(name)
