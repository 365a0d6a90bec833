"""Who uses a model: any number of runs at once, or one thread that changes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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

    def running(self) -> AbstractContextManager[None]:
        """Inside, no other thread changes the model."""
        me = threading.get_ident()
        return self._entered(self._running, lambda: not self._changing or me in self._changing)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, no other thread runs or changes the model.

        Raises:
            ValueError: this thread runs the model already and so does another one. They would wait for each other.
        """
        me = threading.get_ident()

        def alone() -> bool:
            others = {*self._running, *self._changing} - {me}
            if others and me in self._running:
                raise ValueError(
                    "this call has to change a model that another thread is running; run such calls one after the "
                    "other, or give each thread a pipeline with models of its own."
                )
            return not others

        with self._entered(self._changing, alone):
            self.changed_by = me
            yield

    @contextmanager
    def _entered(self, threads: list[int], ready: Callable[[], bool]) -> Iterator[None]:
        with self._free:
            self._free.wait_for(ready)
            threads.append(threading.get_ident())
        try:
            yield
        finally:
            with self._free:
                threads.remove(threading.get_ident())
                self._free.notify_all()


def uncompiled(model: Any) -> Any:
    """The module that `torch.compile` wrapped, whose weights and names are the model's own; else the model."""
    return getattr(model, "_orig_mod", model)


def model_lock(model: Any) -> ModelLock:
    """The lock of a model, compiled or not, or of another object that pipelines share, such as a tokenizer."""
    return vars(uncompiled(model)).setdefault(LOCK_ATTRIBUTE, ModelLock())
