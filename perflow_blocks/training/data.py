"""The trainer's data: what `datasets` reads, as batches of one bucket with an exact position.

A position is an epoch and the number of its batches that were handed out. What a batch holds, every random draw
included, follows from the seed, the epoch and the batch's number, with any number of workers:

- Folders, tables, prompts and the demo have an index. Each epoch is planned from the images' sizes for all processes
  together: they share no sample in an epoch and work in the same bucket at the same time. Resuming reads nothing.
- Streams (webdataset, `data.streaming`) are shuffled in a buffer and sorted into buckets while they are read, each
  process its own part. Resuming reads the current epoch's samples again, without decoding their images.

The positions of `datasets` and torchdata are not exact here: that of a stream leaves out the shuffle buffer and partly
filled buckets, that of a loader holds for one number of workers. Links to folders are not followed.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .buckets import BadSample, Buckets, Sample, TrainingBatch, image_size, make_batch, plan_epoch
from .config import DEMO_IMAGE_SIZE, DataConfig

_CAPTIONS = ("text", "caption", "prompt", "txt")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as imagefolder has them
_MOST_SHARDS = 100_000
_FIRST_LOOK = 200  # a stream none of whose first samples is usable is an error, without waiting for its end
_CHUNK = 32


def _captions(value: Any) -> tuple[str, ...]:
    """The texts in a caption field, a string or several, stripped and without empty ones."""
    values = (value,) if isinstance(value, str) else value if isinstance(value, Sequence) else ()
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip())


def _caption_name(names: Sequence[str], wanted: str | None, where: object) -> str:
    found = [name for name in ((wanted,) if wanted else _CAPTIONS) if name in names]
    if not found:
        what = wanted or " or ".join(_CAPTIONS)
        raise ValueError(f"{where} has no column {what}, only {', '.join(names)}; set data.caption_column")
    return found[0]


@dataclass(frozen=True)
class DemoRows:
    """The embedded model's images, drawn when they are asked for, each with a caption that leaves some of it open."""

    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        from ..demo.images import Prompt, Scene, render

        scene_rng, caption_rng, drawing_rng = (np.random.default_rng([self.seed, index, part]) for part in range(3))
        scene = Scene.random(scene_rng)
        return {"image": render(scene, drawing_rng), "text": Prompt.describe(scene, caption_rng).text}


def open_rows(config: DataConfig, seed: int = 0) -> Any:
    """Rows of "image" (left out for prompts) and "text", an IterableDataset for streams; no image is opened.

    Raises ValueError: the data is not there, cannot be read, or lacks a column.
    """
    if config.kind == "demo":
        return DemoRows(config.max_samples or 10_000, seed)
    if config.kind == "prompts" and not config.captions:
        return datasets.Dataset.from_dict({"text": [""] * (config.max_samples or 10_000)})
    try:
        if config.kind == "folder":
            dataset: Any = _open_folder(Path(str(config.path)).absolute(), config)
        elif config.kind == "webdataset":
            columns = {"image": config.image_column, "caption": config.caption_column}
            shards = {"urls": _shard_urls(str(config.path)), **columns}
            dataset = datasets.IterableDataset.from_generator(_shard_rows, gen_kwargs=shards)
        else:
            dataset = _select(_load(config), config)
    except (OSError, ValueError, RecursionError, DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split()).rstrip(".")
        raise ValueError(f"data.path={config.path} cannot be used: {reason}.") from error
    if config.max_samples is not None:
        return dataset.take(min(config.max_samples, getattr(dataset, "num_rows", config.max_samples)))
    return dataset


def _load(config: DataConfig) -> Any:
    """A dataset of the Hub, or of local files."""
    path, form = Path(str(config.path)), None
    options: dict[str, Any] = {"split": config.split, "streaming": config.streaming}
    if path.is_file():
        form = _FORMATS.get(path.suffix.lower())
        if form is None:
            raise ValueError(f"it is not a {', '.join(_FORMATS)} file")
        if not path.stat().st_size:
            raise ValueError(f"{path.name} is empty")
        options |= {"data_files": str(path)} | ({"encoding": "utf-8-sig"} if form == "text" else {})
    elif not path.is_dir():
        if path.is_absolute() or path.suffix in _FORMATS:
            raise ValueError("there is no such file or directory")
        options |= {"name": config.subset, "revision": config.revision}
    for file in [path] if form == "json" else path.rglob("*.json*"):
        if file.is_file():
            _check_json(file)
    return datasets.load_dataset(form or str(path), **options)


def _check_json(path: Path) -> None:
    """Raises for JSON that is damaged, or nested so deeply that pyarrow would crash the process."""
    with open(path, encoding="utf-8-sig") as file:
        for number, text in enumerate(file if path.suffix == ".jsonl" else [file.read()], start=1):
            try:
                json.loads(text if text.strip() else "null")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of {path.name} is not usable JSON:") from error


def _select(dataset: Any, config: DataConfig) -> Any:
    """The columns of image and captions, with images as they are stored."""
    features, names = dataset.features, dataset.column_names
    if not isinstance(dataset, datasets.Dataset):  # a CSV file, say, tells its columns no earlier
        names = list(next(iter(dataset.decode(False) if features else dataset), ()))
    if not names or getattr(dataset, "num_rows", 1) == 0:
        raise ValueError(f"data.split={config.split} has no rows")
    chosen = {_caption_name(names, config.caption_column, "it"): "text"} if config.captions else {}
    if config.kind != "prompts":
        images = [name for name, kind in (features or {}).items() if isinstance(kind, datasets.Image)]
        image = config.image_column or next(iter(images), "image")
        if image not in names:
            raise ValueError(f"it has no column {image} of images, only {', '.join(names)}; set data.image_column")
        if image in images:
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        chosen[image] = "image"
    return dataset.select_columns([*chosen]).rename_columns({old: new for old, new in chosen.items() if old != new})


def _open_folder(root: Path, config: DataConfig) -> datasets.Dataset:
    """Images in the order of their paths, captioned by metadata files or by .txt files beside them, if at all.

    imagefolder itself takes a millisecond for each file, at every start.
    """
    if not root.is_dir():
        raise ValueError("it is not a folder; name the one that holds the images")
    files = sorted(path for path in root.rglob("*") if not path.name.startswith("."))
    captions: dict[str, tuple[str, ...]] = {}
    for path in files:
        if config.captions and path.name in _METADATA and path.is_file():
            table = _load(DataConfig(kind="datasets", path=str(path)))
            if "file_name" not in table.column_names:
                raise ValueError(f"{path.name} has no column file_name, only {', '.join(table.column_names)}")
            texts = table[_caption_name(table.column_names, config.caption_column, path.name)]
            for name, text in zip(table["file_name"], texts, strict=True):
                captions[os.path.normpath(path.parent / str(name))] = _captions(text)
    bare = [path for path in files if path.suffix.lower() in _SUFFIXES and str(path) not in captions]
    with ThreadPoolExecutor(8) as pool:
        read = _text_beside if config.captions else lambda image: ("",)
        captions |= zip(map(str, bare), pool.map(read, bare), strict=True)
    if not any(captions.values()):
        what = f"images ({', '.join(_SUFFIXES)})"
        if captions:
            what = f"captions; add {_METADATA[0]} or .txt files, or pass data.captions=false"
        raise ValueError(f"the folder holds no {what}")
    names = sorted(captions, key=Path)
    rows = {"image": names, "text": [captions[name] for name in names]}
    return datasets.Dataset.from_dict(rows)


def _text_beside(image: Path) -> tuple[str, ...]:
    text = image.with_suffix(".txt")
    with suppress(OSError, UnicodeDecodeError):
        if text.is_file():  # opening a pipe would wait for a writer
            return _captions(" ".join(text.read_text(encoding="utf-8-sig").split()))
    return ()


def _shard_urls(path: str) -> list[str]:
    """The tar files of a directory, a brace range such as "s-{000..099}.tar", a file or a URL."""
    urls = sorted(map(str, Path(path).glob("*.tar"))) if Path(path).is_dir() else [path]
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        numbers = range(int(span[1]), int(span[2]) + 1)
        if len(numbers) > _MOST_SHARDS:
            raise ValueError(f"it names {len(numbers)} shards; {_MOST_SHARDS} is the most")
        urls = [path.replace(span[0], str(number).zfill(len(span[1]))) for number in numbers]
    missing = [url for url in urls if "://" not in url and not Path(url).is_file()]
    if missing or not urls:
        what = f"{len(missing)} of its {len(urls)} .tar files are missing, such as" if missing else "no .tar files in"
        raise ValueError(f"{what} {', '.join(missing[:1]) or path}")
    return urls


def _shard_rows(urls: list[str], image: str | None, caption: str | None) -> Iterator[dict[str, Any]]:
    """The samples of tar files, in which the files of a sample follow one another and share a name up to its dot.

    `datasets` has a reader too, but it ends at a damaged shard and refuses samples of different kinds of files.
    """
    for url in urls:
        try:
            with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                files = ((entry.name, tar.extractfile(entry).read()) for entry in tar if entry.isfile())  # type: ignore
                for _, group in groupby(files, lambda file: re.sub(r"\.[^/]*$", "", file[0])):
                    fields = {name.rpartition("/")[2].partition(".")[2].lower(): data for name, data in group}
                    yield _shard_row(fields, image, caption)
        except (tarfile.TarError, OSError, EOFError, zlib.error):
            yield {"image": None, "text": None, "bad": "damaged shard"}


def _shard_row(fields: dict[str, Any], image: str | None, caption: str | None) -> dict[str, Any]:
    key = image or next((name for name in fields if f".{name.rpartition('.')[2]}" in _SUFFIXES), "")
    row: dict[str, Any] = {"image": {"bytes": fields.get(key)}}
    with suppress(KeyError, ValueError, TypeError, RecursionError):
        fields = {**json.loads(fields["json"]), **fields}
    text = next((fields[name] for name in ((caption,) if caption else ("txt", *_CAPTIONS)) if name in fields), None)
    row["text"] = text.decode("utf-8-sig", errors="replace") if isinstance(text, bytes) else text
    return row


class BatchSource:
    """Endless epochs of batches for one process; `iter` goes on from the position. Have one iterator at a time."""

    def __init__(self, config: DataConfig, dataset: Any, batch_size: int, seed: int, process: tuple[int, int]) -> None:
        self._config, self._dataset, self._batch_size, self._seed = config, dataset, batch_size, seed
        self._process, self._num_processes = process
        path = Path(str(config.path))
        self._folder = path.parent if path.is_file() else path  # where relative paths of images start
        self._buckets = Buckets(config)
        self._content = ""  # tells the data from other data
        self.skipped: Counter[str] = Counter()  # samples left out so far, by reason; undecodable ones count each time
        self.epoch, self._batch = 0, 0  # the position

    def _groups(self, epoch: int) -> Iterator[tuple[Sequence[Any], int]]:
        """This process' samples of each batch of an epoch, and their bucket."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[TrainingBatch]:
        loader: DataLoader[Any] = DataLoader(
            self,  # type: ignore[arg-type]  # has no length: tasks are endless
            sampler=self._tasks(),
            batch_size=None,  # a task is a batch already
            num_workers=self._config.num_workers,
            generator=torch.Generator(),  # torch's own, which training draws from, is left alone
        )
        empty = 0
        for batch, bad, (self.epoch, self._batch) in loader:
            self.skipped.update(bad)
            empty = 0 if batch is not None else empty + 1
            if empty == _FIRST_LOOK:
                raise self._nothing_usable()
            if batch is not None:
                yield batch

    def _tasks(self) -> Iterator[tuple[Any, ...]]:
        """Batches to be read: samples, size, seeds of the rows' random draws, and the position after it."""
        epoch, first = self.epoch, self._batch
        rows = range(self._process * self._batch_size, (self._process + 1) * self._batch_size)
        while True:
            number = -1
            for number, (members, bucket) in enumerate(self._groups(epoch)):
                if number >= first:
                    seeds = [(self._seed, epoch, number, row) for row in rows]
                    yield members, self._buckets.sizes[bucket], seeds, (epoch, number + 1)
            if number < 0:
                raise self._nothing_usable()
            epoch, first = epoch + 1, 0

    def __getitem__(self, task: tuple[Any, ...]) -> Any:
        """Reads a batch, in a worker or not: the batch or None, why samples are bad, and the position after it."""
        members, size, seeds, after = task
        return *make_batch(self._read, members, size, seeds, self._config), after

    def _read(self, member: Sample | int) -> Sample:
        return member if isinstance(member, Sample) else self._sample(self._dataset[member])

    def _sample(self, row: dict[str, Any]) -> Sample:
        """Raises `BadSample`."""
        captions = _captions(row["text"]) if self._config.captions else ("",)
        if not captions:
            raise BadSample(row.get("bad", "no caption"))
        if self._config.kind == "prompts":
            return Sample(captions, None)
        value = row["image"]
        if isinstance(value, Image.Image):
            return Sample(captions, value)
        stored = value if isinstance(value, dict) else {"path": value}
        path: Any = stored.get("path")
        if not stored.get("bytes") and not isinstance(path, str):
            raise BadSample("missing file")
        return Sample(captions, stored.get("bytes") or (path if "://" in path else self._folder / path))

    def _place(self, sample: Sample) -> tuple[int, float]:
        """Bucket and aspect ratio of a sample, from the image's header; raises `BadSample`."""
        square = (self._config.resolution, self._config.resolution)
        return self._buckets.place(square if sample.image is None else image_size(sample.image))

    def state_dict(self) -> dict[str, Any]:
        """The position, as values that JSON has. Each process saves and loads its own."""
        return {"epoch": self.epoch, "batch": self._batch, "content": self._content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a position, of which a new iterator goes on. Raises ValueError for that of other data."""
        if state.get("content") != self._content:
            what = f"it held {state.get('content')} and holds {self._content}"
            raise ValueError(f"data.path={self._config.path} has changed ({what}); resume with the same data.")
        self.epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def describe(self) -> str:
        """One line for the log: what there is, and what was left out."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common()) or "none"
        return f"data.{self._config.kind} {self._config.path or ''}: {self._content}; left out: {reasons}"

    def _nothing_usable(self) -> ValueError:
        return ValueError(f"{self.describe()}. No sample is usable; give images of data.resolution with captions.")


class _Indexed(BatchSource):
    """Samples that can be read in any order."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        found = self._scan()
        self.skipped.update(place for place in found if isinstance(place, str))
        usable = [(index, *place) for index, place in enumerate(found) if not isinstance(place, str)]
        self._content = f"{len(usable)} samples ({zlib.crc32(repr(usable).encode()):08x})"
        if not usable:
            raise self._nothing_usable()
        self._indices, self._homes, self._aspects = map(np.asarray, zip(*usable, strict=True))

    def _scan(self) -> list[tuple[int, float] | str]:
        """The bucket and aspect ratio of each sample, or why it is left out."""
        count = len(self._dataset)
        if self._config.kind == "demo":
            return [self._buckets.place((DEMO_IMAGE_SIZE, DEMO_IMAGE_SIZE))] * count

        def look(start: int) -> list[tuple[int, float] | str]:
            chunk, places = self._dataset[start : start + _CHUNK], list[tuple[int, float] | str]()
            for values in zip(*chunk.values(), strict=True):
                try:
                    places.append(self._place(self._sample(dict(zip(chunk, values, strict=True)))))
                except BadSample as bad:
                    places.append(str(bad))
            return places

        starts = range(0, count, _CHUNK)
        with ThreadPoolExecutor(8) as pool:
            parts = tqdm(pool.map(look, starts), "look at data", len(starts), disable=self._process > 0 or None)
            return [place for part in parts for place in part]

    def _groups(self, epoch: int) -> Iterator[tuple[Sequence[Any], int]]:
        rng = np.random.default_rng([self._seed, epoch])
        for group, bucket in plan_epoch(self._homes, self._aspects, self._batch_size * self._num_processes, rng):
            own = group.reshape(self._num_processes, -1)[self._process]
            yield self._indices[own].tolist(), bucket


class _Streamed(BatchSource):
    """Samples that are read one after the other, here; workers decode them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._content = f"a stream of {self._dataset.num_shards} shards"
        # `datasets` waits seconds at the end of an epoch where it reads several shards at a time.
        shuffled = self._dataset.shuffle(self._seed, None, self._config.shuffle_buffer, max_buffer_input_shards=1)
        self._dataset = split_dataset_by_node(shuffled, self._process, self._num_processes)

    def _groups(self, epoch: int) -> Iterator[tuple[Sequence[Any], int]]:
        waiting: dict[int, list[tuple[Sample, int, float]]] = {}
        good, size = 0, self._batch_size
        self._dataset.set_epoch(epoch)
        for seen, row in enumerate(self._dataset, start=1):
            try:
                sample = self._sample(row)
                bucket, aspect = self._place(sample)
            except BadSample as bad:
                self.skipped[str(bad)] += 1
                if seen == _FIRST_LOOK and not good:
                    raise self._nothing_usable() from bad
                continue
            good += 1
            waiting.setdefault(bucket, []).append((sample, bucket, aspect))
            if len(waiting[bucket]) == size:
                yield [member for member, *_ in waiting.pop(bucket)], bucket
        rest = [member for members in waiting.values() for member in members]
        if len(rest) >= size or (rest and len(rest) == good):
            homes, aspects = np.asarray([row[1] for row in rest]), np.asarray([row[2] for row in rest])
            for group, bucket in plan_epoch(homes, aspects, size, np.random.default_rng(epoch)):
                yield [rest[number][0] for number in group], bucket


def open_dataset(
    config: DataConfig, *, batch_size: int, seed: int, process_index: int = 0, num_processes: int = 1
) -> BatchSource:
    """The batches of `batch_size` rows that process `process_index` of `num_processes` trains on.

    Unless the data is a stream, captions and the headers of images are looked at first. Raises ValueError: the data
    cannot be read, or nothing in it is usable.
    """
    dataset = open_rows(config, seed)
    kind = _Streamed if isinstance(dataset, datasets.IterableDataset) else _Indexed
    return kind(config, dataset, batch_size, seed, (process_index, num_processes))
