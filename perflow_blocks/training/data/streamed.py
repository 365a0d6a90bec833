"""Batches from samples that can only be read one after the other."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .batch import Size, TrainingBatch
from .buckets import Buckets
from .config import DataConfig
from .cropping import Cutter, View, stack
from .pictures import NO_CAPTION, TOO_SMALL, UNREADABLE, BadPicture, picture_size
from .plan import group_leftovers
from .position import Position, check_state
from .reading import Loaded, read
from .records import StoredPicture
from .skips import Skips

_EARLY_LOOK = 200  # samples after which a stream of mostly bad ones is reported, without waiting for its end


@dataclass(frozen=True, kw_only=True)
class StreamSample:
    """A sample as it was read. `picture` is the reason for leaving it out where it could not even be got at."""

    name: str
    captions: tuple[str, ...]
    picture: StoredPicture | BadPicture


class SampleStream(Protocol):
    """This process's part of a data set that is read in order."""

    checksum: int
    """Tells the files of the data set from those of another one, wherever they lie."""

    def read(self, epoch: int, skips: Skips) -> Iterator[StreamSample]:
        """The samples of an epoch in an order that the epoch and the seed settle; what is damaged goes to `skips`."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class StreamTask:
    """One batch to be decoded: its samples, the size to cut to, and for each row what seeds its random draws."""

    samples: tuple[StreamSample, ...]
    size: Size
    seeds: tuple[tuple[int, ...], ...]
    after: Position


@dataclass(frozen=True, kw_only=True)
class StreamReader:
    """Decodes the samples of a task; a bad one's place is taken by the next good one of the batch."""

    cutter: Cutter

    def __getitem__(self, task: StreamTask) -> Loaded:
        bad: dict[str, str] = {}
        views = [self._view(row, task, bad) for row in range(len(task.samples))]
        good = [view for view in views if view is not None]
        return Loaded(batch=stack(good) if good else None, after=task.after, bad=bad)

    def _view(self, row: int, task: StreamTask, bad: dict[str, str]) -> View | None:
        for sample in (*task.samples[row:], *task.samples[:row]):
            if sample.name in bad:
                continue
            assert not isinstance(sample.picture, BadPicture)
            try:
                rng = np.random.default_rng(task.seeds[row])
                return self.cutter.view(sample.captions, sample.picture, task.size, rng)
            except BadPicture as error:
                bad[sample.name] = error.reason
        return None


class StreamedSource:
    """A `BatchSource` over a stream.

    Reading and sorting into buckets happen in the training process, decoding in the workers. A position is an epoch
    and a number of batches: taking it up reads that epoch again from its beginning, without decoding. Each process
    goes through its own part for as long as it is asked, so none waits for another one's data; the lengths of their
    epochs may differ, and they may work in different buckets at the same time.
    """

    def __init__(
        self,
        stream: SampleStream,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        process_index: int,
        num_processes: int,
    ) -> None:
        self._stream = stream
        self._buckets = Buckets.of(config)
        self._max_enlargement = config.max_enlargement
        self._reader = StreamReader(cutter=Cutter.of(config))
        self._skips = Skips(stream.describe())
        self._batch_size, self._seed, self._process_index = batch_size, seed, process_index
        self._num_workers = config.num_workers
        self._position: Position = (0, 0)
        self._identity = {
            "checksum of the files": stream.checksum,
            "seed": seed,
            "batch size": batch_size,
            "process": process_index,
            "number of processes": num_processes,
            "shuffle_buffer": config.shuffle_buffer,
            "max_samples": config.max_samples,
            "checksum of the bucket sizes": zlib.crc32(np.asarray(self._buckets.sizes, "<i8").tobytes()),
        }

    def __iter__(self) -> Iterator[TrainingBatch]:
        last_good = self._position[0]
        for loaded in read(self._reader, self._tasks(*self._position), self._num_workers):
            self._position = loaded.after
            for name, reason in loaded.bad.items():
                self._skips.add(name, reason)
            if loaded.batch is not None:
                last_good = self.epoch
                yield loaded.batch
            elif self.epoch > last_good + 1:
                raise self._nothing_usable()

    def state_dict(self) -> dict[str, Any]:
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch, "bad": self._skips.state(), "of": dict(self._identity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state["of"], self._identity)
        self._position = (int(state["epoch"]), int(state["batch"]))
        for name, reason in state["bad"].items():
            self._skips.add(name, reason)

    @property
    def epoch(self) -> int:
        return self._position[0]

    @property
    def skipped(self) -> Counter[str]:
        return self._skips.counts()

    @property
    def num_samples(self) -> None:
        return None

    def describe(self) -> str:
        return f"{self._stream.describe()}; left out so far: {self._skips.text()}"

    def _tasks(self, epoch: int, batch: int) -> Iterator[StreamTask]:
        while True:
            number = -1
            for number, (samples, bucket) in enumerate(self._groups(epoch)):
                if number >= batch:
                    seeds = tuple(
                        (self._seed, epoch, self._process_index, number, row) for row in range(self._batch_size)
                    )
                    size = self._buckets.sizes[bucket]
                    yield StreamTask(samples=samples, size=size, seeds=seeds, after=(epoch, number + 1))
            if number < 0:
                raise self._nothing_usable()
            epoch, batch = epoch + 1, 0

    def _groups(self, epoch: int) -> Iterator[tuple[tuple[StreamSample, ...], int]]:
        """Samples of an epoch, a batch at a time, with its bucket; what buckets have left over comes last."""
        waiting: dict[int, list[tuple[StreamSample, float]]] = {}
        any_group = False
        for sample, bucket, aspect in self._usable(epoch):
            members = waiting.setdefault(bucket, [])
            members.append((sample, aspect))
            if len(members) == self._batch_size:
                any_group = True
                yield tuple(member for member, _ in waiting.pop(bucket)), bucket
        rest = [(sample, bucket, aspect) for bucket, part in waiting.items() for sample, aspect in part]
        if not rest:
            return
        numbers, homes = np.arange(len(rest)), np.asarray([bucket for _, bucket, _ in rest])
        aspects = np.asarray([aspect for _, _, aspect in rest])
        for chosen, bucket in group_leftovers(numbers, homes, aspects, self._batch_size, repeat=not any_group):
            yield tuple(rest[number][0] for number in chosen), bucket

    def _usable(self, epoch: int) -> Iterator[tuple[StreamSample, int, float]]:
        seen = 0
        for seen, sample in enumerate(self._stream.read(epoch, self._skips), start=1):
            try:
                bucket, aspect = self._place(sample)
            except BadPicture as bad:
                self._skips.add(sample.name, bad.reason)
            else:
                yield sample, bucket, aspect
            if seen == _EARLY_LOOK:
                self._skips.warn_if_most(seen)
        self._skips.warn_if_most(seen)

    def _place(self, sample: StreamSample) -> tuple[int, float]:
        """The bucket of a sample and its aspect ratio; raises `BadPicture`."""
        if not sample.captions:
            raise BadPicture(NO_CAPTION)
        if isinstance(sample.picture, BadPicture):
            raise sample.picture
        height, width = picture_size(sample.picture)
        if not height or not width:
            raise BadPicture(UNREADABLE)
        sizes = np.asarray([[height, width]])
        home = self._buckets.nearest(sizes)
        if self._buckets.enlargement(sizes, home)[0] > self._max_enlargement:
            raise BadPicture(TOO_SMALL)
        return int(home[0]), height / width

    def _nothing_usable(self) -> ValueError:
        return ValueError(
            f"{self._stream.describe()}: no usable sample in a whole epoch, left out were: {self._skips.text()}; "
            "give pictures with captions, large enough for data.resolution, and at least a sample for each process."
        )
