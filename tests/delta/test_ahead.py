"""Items that are computed on another thread while the one before is worked on."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from perflow_blocks.delta.ahead import computed_ahead


@pytest.fixture(autouse=True)
def two_torch_threads() -> Generator[None, None, None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Counting:
    """Numbers, and how far their computation has come."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self.begun: list[int] = []
        self.names: set[str] = set()

    def numbers(self, end: int, fail_at: int = -1) -> Generator[int, None, None]:
        for number in range(end):
            self.begun.append(number)
            self.names.add(threading.current_thread().name)
            self.reached.release()
            if number == fail_at:
                raise ValueError("no such number")
            yield number


def test_the_next_one_is_computed_meanwhile_and_no_further() -> None:
    counting = Counting()
    for number in computed_ahead(counting.numbers(4)):
        while len(counting.begun) < min(number + 2, 4):
            assert counting.reached.acquire(timeout=10), "the next item is not computed ahead"
        assert counting.begun == list(range(min(number + 2, 4)))
    assert number == 3
    assert threading.current_thread().name not in counting.names and len(counting.names) == 1


def test_as_many_are_computed_ahead_as_asked_for() -> None:
    counting = Counting()
    with closing(computed_ahead(counting.numbers(9), 3)) as numbers:
        for number in (0, 1, 2):
            assert next(numbers) == number
            while len(counting.begun) < number + 4:
                assert counting.reached.acquire(timeout=10), "three items are not computed ahead"
            assert counting.begun == list(range(number + 4))
    assert list(computed_ahead(Counting().numbers(2), 5)) == [0, 1]


def test_what_it_is_made_from_is_closed_too() -> None:
    inner = Counting().numbers(9)
    outer = computed_ahead(inner, 2)
    with closing(computed_ahead(outer)) as ahead:
        next(ahead)
    assert [inspect.getgeneratorstate(items) for items in (inner, outer)] == ["GEN_CLOSED"] * 2
    assert not any(thread.name.startswith("computed_ahead") for thread in threading.enumerate())


def test_what_is_not_begun_is_not_computed_once_it_is_closed() -> None:
    counting, go_on = Counting(), threading.Event()

    def slow() -> Generator[int, None, None]:
        for number in counting.numbers(9):
            yield number
            go_on.wait(10)

    numbers = computed_ahead(slow(), 5)
    next(numbers)
    threading.Timer(0.1, go_on.set).start()
    numbers.close()
    assert len(counting.begun) <= 2


def test_what_was_not_begun_leaves_no_thread() -> None:
    """Closed or forgotten, as where an interrupt comes before the first item is asked for; of a chain, all."""
    started = set(threading.enumerate())
    numbers = computed_ahead(Counting().numbers(9))
    chain = computed_ahead(computed_ahead(Counting().numbers(9), 2))
    threads = set(threading.enumerate()) - started
    assert len(threads) == 3
    numbers.close()
    del numbers, chain
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_an_interrupt_while_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thread that waits for the other one's end, as by a second Ctrl-C."""
    go_on, ended = threading.Event(), threading.Event()

    def slow() -> Generator[int, None, None]:
        try:
            yield 0
            go_on.wait(10)
            yield 1
        finally:
            ended.set()

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    numbers = computed_ahead(slow())
    next(numbers)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            numbers.close()
    go_on.set()
    assert ended.wait(10)


def test_a_failure_comes_after_the_items_before_it() -> None:
    got = []
    with pytest.raises(ValueError, match="no such number"):
        for number in computed_ahead(Counting().numbers(9, fail_at=2)):
            got.append(number)
    assert got == [0, 1]


def test_nothing_runs_on_once_it_is_closed() -> None:
    counting = Counting()
    with closing(computed_ahead(counting.numbers(9))) as numbers:
        next(numbers)
    assert len(counting.begun) <= 2
    assert not any(thread.name.startswith("computed_ahead") for thread in threading.enumerate())


def test_torch_has_one_thread_there_and_as_many_as_before_elsewhere() -> None:
    def counts() -> Generator[int, None, None]:
        for _ in range(3):
            torch.ones(1 << 18).add_(1)
            yield torch.get_num_threads()

    def and_of_another(counts: Generator[int, None, None]) -> Generator[tuple[int, int], None, None]:
        for count in counts:
            yield count, torch.get_num_threads()

    for both in computed_ahead(and_of_another(computed_ahead(counts()))):
        assert both == (1, 1) and torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as fresh:  # a thread that is started meanwhile
            assert fresh.submit(torch.get_num_threads).result() == 2
