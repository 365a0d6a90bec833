"""Who uses a model: any number of runs at once, or one thread that changes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCK_ATTRIBUTE = "_perflow_lock"


class ModelLock:
    """Threads that run a model wait for one that changes its weights, hooks or type, and the other way round.

    Used as a context manager by itself, it is held for a moment, to look at what is kept on the model. `running` and
    `changing` may be nested in one thread. A copy, also a pickled one, is a new lock.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        self._free = threading.Condition()
        self._running: list[int] = []  # the threads that run the model, as often as they asked to
        self._changing: list[int] = []  # the thread that changes it, likewise
        self.changed_by: int | None = None  # the thread that changed it last

    def __enter__(self) -> None:
        self._mutex.acquire()

    def __exit__(self, *exception: object) -> None:
        self._mutex.release()

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        return ModelLock, ()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, no other thread changes the model."""
        me = threading.get_ident()
        with self._free:
            self._free.wait_for(lambda: not self._changing or me in self._changing)
            self._running.append(me)
        try:
            yield
        finally:
            self._done(self._running, me)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, no other thread runs or changes the model.

        Raises:
            ValueError: this thread runs the model already and so does another one. They would wait for each other.
        """
        me = threading.get_ident()
        with self._free:
            if me in self._running and self._others(me):
                raise ValueError(
                    "this call has to change a model that another thread is running; run such calls one after the "
                    "other, or give each thread a pipeline with models of its own."
                )
            self._free.wait_for(lambda: not self._others(me))
            self._changing.append(me)
            self.changed_by = me
        try:
            yield
        finally:
            self._done(self._changing, me)

    def _done(self, threads: list[int], me: int) -> None:
        with self._free:
            threads.remove(me)
            self._free.notify_all()

    def _others(self, me: int) -> bool:
        return any(thread != me for thread in (*self._running, *self._changing))


def uncompiled(model: Any) -> Any:
    """The module that `torch.compile` wrapped, whose weights and names are the model's own; else the model."""
    return getattr(model, "_orig_mod", model)


def model_lock(model: Any) -> ModelLock:
    """The lock of a model, compiled or not, or of another object that pipelines share, such as a tokenizer."""
    return vars(uncompiled(model)).setdefault(LOCK_ATTRIBUTE, ModelLock())
