"""Tasks, each of them a batch to be read, go through torch's DataLoader, with worker processes or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from .batch import TrainingBatch
from .position import Position


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A batch (None if none of its pictures can be decoded), the position behind it, and what was bad and why."""

    batch: TrainingBatch | None
    after: Position
    bad: dict[str, str]


class Reader(Protocol):
    """Reads the batch of a task. It is sent to worker processes; its result depends on the task alone."""

    def __getitem__(self, task: Any, /) -> Loaded: ...


def read(reader: Reader, tasks: Iterator[Any], num_workers: int) -> Iterator[Loaded]:
    """The batches of endless `tasks` in their order, the same ones for any number of workers."""
    loader: DataLoader[Any] = DataLoader(
        reader,  # type: ignore[arg-type]  # has no length: tasks are endless
        sampler=tasks,
        batch_size=None,  # a task is a batch already
        collate_fn=_unchanged,
        num_workers=num_workers,
        generator=torch.Generator(),  # so that torch's own, which training draws from, is left alone
    )
    return iter(loader)


def _unchanged(loaded: Any) -> Any:
    return loaded
