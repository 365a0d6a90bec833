"""Computing on a thread of its own what is asked for next."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch

T = TypeVar("T")


def computed_ahead(items: Generator[T, None, None], depth: int = 1) -> Generator[T, None, None]:
    """The items, none of them None, up to `depth` of them computed on another thread while one is worked on.

    There torch computes on a single core. Where many short operations follow one another, its threads would spend
    their time waiting for each other, all the more when other programs want the cores too.
    Closing this ends the thread and closes `items`; what it computes by then is dropped.
    """
    with closing(items), ThreadPoolExecutor(1, "computed_ahead") as thread:
        threads = torch.get_num_threads()
        thread.submit(_use_one_core).result()
        torch.set_num_threads(threads)  # what threads begin with that are started from here on
        coming: deque[Future[T | None]] = deque(thread.submit(next, items, None) for _ in range(depth))
        try:
            while (item := coming.popleft().result()) is not None:
                coming.append(thread.submit(next, items, None))
                yield item
        finally:
            for future in coming:
                future.cancel()


def _use_one_core() -> None:
    torch.get_num_threads()  # the first call in a thread would undo what is set before it
    torch.set_num_threads(1)
