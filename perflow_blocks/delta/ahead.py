"""Computing on a thread of its own what is asked for next."""

from __future__ import annotations

from collections.abc import Generator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar
from weakref import finalize

import torch

T = TypeVar("T")

_Result = tuple[T | None, BaseException | None]


def computed_ahead(items: Generator[T, None, None], depth: int = 1) -> Generator[T, None, None]:
    """The items, none of them None, up to `depth` of them computed on another thread while one is worked on.

    There torch computes on a single core. Where many short operations follow one another, its threads would spend
    their time waiting for each other, all the more when other programs want the cores too.

    The thread is started at once, so that of several that feed one another each is started by the caller, whose number
    of torch threads is what later ones begin with. Closing what is returned ends the thread, where `items` is closed
    after what it computes by then, which is dropped.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()
    computed: SimpleQueue[_Result[T]] = SimpleQueue()
    # No pool: an interrupt in the waiting for its futures, which is Python code with locks, can leave one locked.
    thread = Thread(target=_compute, args=(items, wanted, computed), name="computed_ahead", daemon=True)
    threads = torch.get_num_threads()
    thread.start()
    computed.get()
    torch.set_num_threads(threads)
    received = _received(thread, wanted, computed, depth)
    finalize(received, wanted.put, False)  # closing a generator that was not begun runs nothing of it
    return received


def _compute(items: Generator[T, None, None], wanted: SimpleQueue[bool], computed: SimpleQueue[_Result[T]]) -> None:
    torch.get_num_threads()  # the first call in a thread would undo what is set before it
    torch.set_num_threads(1)
    computed.put((None, None))
    try:
        while wanted.get():
            try:
                computed.put((next(items, None), None))
            except BaseException as error:
                computed.put((None, error))
    finally:
        items.close()


def _received(
    thread: Thread, wanted: SimpleQueue[bool], computed: SimpleQueue[_Result[T]], depth: int
) -> Generator[T, None, None]:
    try:
        for _ in range(depth):
            wanted.put(True)
        while True:
            item, error = computed.get()
            if error is not None:
                raise error
            if item is None:
                return
            wanted.put(True)
            yield item
    finally:
        while not wanted.empty():  # what is not begun is not wanted any more
            try:
                wanted.get_nowait()
            except Empty:
                break
        wanted.put(False)
        thread.join()
