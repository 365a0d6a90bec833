"""webdataset shards: tar files in which the files of a sample share a name, such as 17.jpg and 17.txt."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from .config import CAPTION_NAMES, DataConfig
from .json_lines import caption_name
from .pictures import MISSING, SUFFIXES, BadPicture
from .records import as_captions
from .skips import Skips
from .streamed import StreamSample

DAMAGED = "damaged shard"  # what can be read of it is used

Sample = dict[str, Any]


class ShardStream:
    """This process's part of the shards.

    With at least as many shards as processes each has shards of its own; otherwise, or where `max_samples` limits all
    of them together, every process reads everything and they take turns.
    """

    def __init__(
        self, urls: list[str], config: DataConfig, *, seed: int, process_index: int, num_processes: int
    ) -> None:
        self.checksum = zlib.crc32(" ".join(PurePosixPath(url).name for url in urls).encode())
        self._urls = urls
        self._config = config
        self._seed, self._process_index, self._num_processes = seed, process_index, num_processes

    @classmethod
    def open(cls, config: DataConfig, *, seed: int, process_index: int, num_processes: int) -> ShardStream:
        """Finds the shards.

        Raises:
            ValueError: there are none, or some are not there.
        """
        urls = shard_urls(config)
        return cls(urls, config, seed=seed, process_index=process_index, num_processes=num_processes)

    def read(self, epoch: int, skips: Skips) -> Iterator[StreamSample]:
        from webdataset import shuffle

        limit = self._config.max_samples
        rng = random.Random(f"{self._seed} {epoch}")
        urls = list(self._urls)
        if limit is not None:
            urls_in_order, own = urls, slice(self._process_index, limit, self._num_processes)
        elif len(urls) >= self._num_processes:
            urls_in_order, own = urls[self._process_index :: self._num_processes], slice(None)
            rng.shuffle(urls_in_order)
        else:
            rng.shuffle(urls)
            urls_in_order, own = urls, slice(self._process_index, None, self._num_processes)
        samples = islice(_samples(urls_in_order, skips), own.start, own.stop, own.step)
        size = self._config.shuffle_buffer
        for sample in shuffle(size, initial=size, rng=rng)(samples):
            yield _stream_sample(sample, self._config)

    def describe(self) -> str:
        return f"{len(self._urls)} shards {self._config.path}"


def shard_problems(config: DataConfig) -> list[str]:
    """What keeps shards from being used, found from their names and the first sample of the first local one."""
    try:
        urls = shard_urls(config)
    except ValueError as error:
        return [str(error)]
    first_local = next((url for url in urls if _is_local(url)), None)
    if first_local is None:
        return []
    sample = next(_samples([first_local], Skips(first_local)), None)
    if sample is None:
        return [f"there are no samples in {first_local}; give tar files with pictures and captions."]
    found = []
    names = ", ".join(key for key in sample if not key.startswith("__"))
    if _image_key(sample, config.image_column) is None:
        wanted = config.image_column or ", ".join(SUFFIXES)
        found.append(
            f"the first sample of {first_local} has no picture ({wanted}), it has {names}; set data.image_column."
        )
    if not _captions(sample, config.caption_column):
        wanted = config.caption_column or ", ".join(("txt", *CAPTION_NAMES))
        found.append(
            f"the first sample of {first_local} has no caption ({wanted}), it has {names}; set data.caption_column."
        )
    return found


def shard_urls(config: DataConfig) -> list[str]:
    """The shards that `path` names, directories and brace ranges resolved.

    Raises:
        ValueError: there are none, or local ones are not there.
    """
    from webdataset.shardlists import expand_urls

    path = str(config.path)
    directory = Path(path).expanduser()
    if directory.is_dir():
        urls = sorted(str(shard) for shard in directory.glob("*.tar"))
        if not urls:
            raise ValueError(f"there are no .tar files in data.path={path!r}; name the directory of the shards.")
        return urls
    urls = [str(Path(url).expanduser()) if _is_local(url) else url for url in expand_urls(path)]
    missing = [url for url in urls if _is_local(url) and not Path(url).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(urls)} shards of data.path={path!r} are not there, the first one {missing[0]}; "
            "correct the range or the directory."
        )
    return urls


def _is_local(url: str) -> bool:
    return not url.startswith("pipe:") and "://" not in url


def _samples(urls: list[str], skips: Skips) -> Iterator[Sample]:
    from webdataset import tarfile_samples

    def note(error: Exception) -> bool:
        # webdataset appends the shard to the arguments of what it catches
        skips.add(next((str(part) for part in reversed(error.args) if str(part) in urls), str(error)), DAMAGED)
        return True

    return iter(tarfile_samples(({"url": url} for url in urls), handler=note))


def _stream_sample(sample: Sample, config: DataConfig) -> StreamSample:
    key = _image_key(sample, config.image_column)
    return StreamSample(
        name=f"{sample['__url__']}/{sample['__key__']}",
        captions=_captions(sample, config.caption_column),
        picture=sample[key] if key else BadPicture(MISSING),
    )


def _image_key(sample: Sample, wanted: str | None) -> str | None:
    if wanted:
        return wanted if wanted in sample else None
    return next((key for key in sample if f".{key.rsplit('.', 1)[-1]}" in SUFFIXES), None)


def _captions(sample: Sample, wanted: str | None) -> tuple[str, ...]:
    for name in (wanted,) if wanted else ("txt", *CAPTION_NAMES):
        if isinstance(sample.get(name), bytes):
            return as_captions(sample[name].decode("utf-8-sig", errors="replace"))
    try:
        row = json.loads(sample.get("json", b"{}"))
    except ValueError:
        return ()
    key = caption_name(row, wanted) if isinstance(row, dict) else None
    return as_captions(row[key]) if key else ()
