"""Batches from samples that can be read in any order."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch import Size, TrainingBatch
from .buckets import Buckets
from .config import DataConfig
from .cropping import Cutter, View, stack
from .pictures import BadPicture
from .plan import Group, plan_epoch
from .position import Position, check_state
from .reading import Loaded, read
from .records import Records
from .scan import Scan, scan
from .skips import Skips


@dataclass(frozen=True, kw_only=True)
class IndexedTask:
    """One batch to be read: rows of the scan, the size to cut to, and for each row what seeds its random draws."""

    members: NDArray[np.int64]
    size: Size
    seeds: tuple[tuple[int, ...], ...]
    after: Position


@dataclass(frozen=True, kw_only=True)
class IndexedReader:
    """Reads the samples of a task, and others in the place of those that cannot be decoded."""

    records: Records
    found: Scan
    cutter: Cutter

    def __getitem__(self, task: IndexedTask) -> Loaded:
        bad: dict[str, str] = {}
        views = [
            self._view(int(row), task.size, seed, bad) for row, seed in zip(task.members, task.seeds, strict=True)
        ]
        return Loaded(batch=stack(views), after=task.after, bad=bad)

    def _view(self, row: int, size: Size, seed: tuple[int, ...], bad: dict[str, str]) -> View:
        for candidate in self._candidates(row):
            index = int(self.found.indices[candidate])
            try:
                captions, stored = self.records.captions(index), self.records.picture(index)
                return self.cutter.view(captions, stored, size, np.random.default_rng(seed))
            except BadPicture as error:
                bad[str(index)] = error.reason
        raise ValueError(f"{self.records.describe()}: not one picture can be decoded; look at the files.")

    def _candidates(self, row: int) -> Iterator[int]:
        """The row itself, the rows behind it in its bucket, then any other."""
        yield row
        others = np.roll(np.arange(len(self.found.homes)), -row - 1)[:-1]
        near = self.found.homes[others] == self.found.homes[row]
        yield from others[near].tolist()
        yield from others[~near].tolist()


class IndexedSource:
    """A `BatchSource` over numbered samples.

    An epoch is settled by the seed, its number, the samples, and the rows of all processes together; each process
    takes its rows of every group. So within an epoch processes share no sample (unless there are fewer than one
    group), have equally many batches, and work in the same bucket at the same time. A position is an epoch and a
    number of batches; taking it up reads nothing.
    """

    def __init__(
        self,
        records: Records,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        process_index: int,
        num_processes: int,
    ) -> None:
        """Looks at every sample: its caption and the header of its picture.

        Raises:
            ValueError: nothing is usable.
        """
        self._buckets = Buckets.of(config)
        self._skips = Skips(records.describe())
        self._found = scan(records, self._buckets, config.max_enlargement, self._skips, quiet=process_index > 0)
        self._reader = IndexedReader(records=records, found=self._found, cutter=Cutter.of(config))
        self._rows = range(process_index * batch_size, (process_index + 1) * batch_size)
        self._group_size = batch_size * num_processes
        self._seed, self._num_workers = seed, config.num_workers
        self._undecodable: dict[str, str] = {}  # a run that resumes finds the other bad ones again by itself
        self._position: Position = (0, 0)

    def __iter__(self) -> Iterator[TrainingBatch]:
        for loaded in read(self._reader, self._tasks(*self._position), self._num_workers):
            self._position = loaded.after
            self._note(loaded.bad)
            assert loaded.batch is not None
            yield loaded.batch

    def state_dict(self) -> dict[str, Any]:
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch, "bad": dict(self._undecodable), "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state["of"], self._identity())
        self._position = (int(state["epoch"]), int(state["batch"]))
        self._note(state["bad"])

    @property
    def epoch(self) -> int:
        return self._position[0]

    @property
    def skipped(self) -> Counter[str]:
        return self._skips.counts()

    @property
    def num_samples(self) -> int:
        return len(self._found.indices)

    def describe(self) -> str:
        used = len(np.unique(self._found.homes))
        return (
            f"{self._reader.records.describe()}: {self.num_samples} samples in "
            f"{used} {'bucket' if used == 1 else 'buckets'}; left out: {self._skips.text()}"
        )

    def _identity(self) -> dict[str, int]:
        sizes = np.asarray(self._buckets.sizes)[self._found.homes]
        return {
            "seed": self._seed,
            "rows of all processes": self._group_size,
            "number of samples": self.num_samples,
            "checksum of the bucket sizes": zlib.crc32(sizes.astype("<i8").tobytes()),
        }

    def _note(self, bad: Mapping[str, str]) -> None:
        for name, reason in bad.items():
            self._skips.add(name, reason)
            self._undecodable[name] = reason
        if bad:
            self._skips.warn_if_most(len(self._reader.records))

    def _tasks(self, epoch: int, batch: int) -> Iterator[IndexedTask]:
        while True:
            rng = np.random.default_rng([self._seed, epoch])
            groups = plan_epoch(self._found.homes, self._found.aspects, self._group_size, rng)
            for number in range(batch, len(groups)):
                after = (epoch, number + 1) if number + 1 < len(groups) else (epoch + 1, 0)
                yield self._task(groups[number], epoch, number, after)
            epoch, batch = epoch + 1, 0

    def _task(self, group: Group, epoch: int, number: int, after: Position) -> IndexedTask:
        members, bucket = group
        return IndexedTask(
            members=members[self._rows.start : self._rows.stop],
            size=self._buckets.sizes[bucket],
            seeds=tuple((self._seed, epoch, number, row) for row in self._rows),
            after=after,
        )
