"""Hugging Face data sets of the Hub, saved to disk, or as local parquet, arrow, JSON and CSV files."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batch import Size
from .config import CAPTION_NAMES, DataConfig
from .json_lines import caption_name
from .pictures import MISSING, UNREADABLE, BadPicture
from .records import StoredPicture, as_captions
from .skips import Skips
from .streamed import StreamSample

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_IMAGE_NAME = "image"
_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_SAVED_ONE, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` leaves in a directory


class TableRecords:
    """A data set of which every row can be read at any time."""

    def __init__(self, dataset: Dataset, columns: tuple[str, str], config: DataConfig) -> None:
        from datasets import Image

        image, caption = columns
        self.size: Size | None = None
        self._config, self._folder = config, _folder(config)
        self._pictures = dataset.select_columns([image]).cast_column(image, Image(decode=False))
        self._captions = dataset.select_columns([caption])
        self._columns = columns

    @classmethod
    def open(cls, config: DataConfig) -> TableRecords:
        """Downloads what is not here yet.

        Raises:
            ValueError: no such data set, split or column, or it is empty.
        """
        dataset = _load(config, streaming=False)
        columns = _columns(dataset.features, list(dataset.column_names), config)
        if config.max_samples is not None:
            dataset = dataset.select(range(min(config.max_samples, len(dataset))))
        if len(dataset) == 0:
            raise _no_rows(config)
        return cls(dataset, columns, config)

    def __len__(self) -> int:
        return len(self._captions)

    def captions(self, index: int) -> tuple[str, ...]:
        return as_captions(self._captions[index][self._columns[1]])

    def picture(self, index: int) -> StoredPicture:
        return _stored(self._pictures[index][self._columns[0]], self._folder)

    def describe(self) -> str:
        return _where(self._config)


class TableStream:
    """This process's part of a data set that is read while training.

    With at least as many files as processes each has files of its own. Otherwise, or where `max_samples` limits all of
    them together, every process reads everything and they take turns.
    """

    def __init__(
        self, dataset: IterableDataset, columns: tuple[str, str], turns: tuple[int, int], config: DataConfig
    ) -> None:
        """`turns` are the number of the first row to take, and the step to the next one."""
        self.checksum = zlib.crc32(f"{dataset.num_shards} {columns}".encode())
        self._dataset, self._columns, self._turns = dataset, columns, turns
        self._config, self._folder = config, _folder(config)

    @classmethod
    def open(cls, config: DataConfig, *, seed: int, process_index: int, num_processes: int) -> TableStream:
        """Opens the data set and looks at its columns.

        Raises:
            ValueError: no such data set, split or column, or it is empty.
        """
        from datasets import Image

        dataset = _load(config, streaming=True)
        columns = _stream_columns(dataset, config)
        dataset = dataset.select_columns(list(columns))
        if dataset.features is not None:
            dataset = dataset.cast_column(columns[0], Image(decode=False))
        turns = (process_index, num_processes)
        if config.max_samples is not None:
            dataset = dataset.take(config.max_samples)
        elif dataset.num_shards >= num_processes:
            # Splitting before shuffling keeps each process to its files, in whatever epoch the others are.
            dataset, turns = dataset.shard(num_processes, process_index, contiguous=False), (0, 1)
        # One file at a time: reading several at once, `datasets` waits five seconds at the end of every epoch.
        dataset = dataset.shuffle(seed=seed, buffer_size=config.shuffle_buffer, max_buffer_input_shards=1)
        return cls(dataset, columns, turns, config)

    def read(self, epoch: int, skips: Skips) -> Iterator[StreamSample]:
        image, caption = self._columns
        self._dataset.set_epoch(epoch)
        first, step = self._turns
        for row in islice(self._dataset, first, None, step):
            picture: StoredPicture | BadPicture
            try:
                picture = _stored(row[image], self._folder)
            except BadPicture as bad:
                picture = bad
            captions = as_captions(row[caption])
            yield StreamSample(name=_name(_as_entry(row[image]), captions), captions=captions, picture=picture)

    def describe(self) -> str:
        return f"stream of {_where(self._config)}"


def table_problems(config: DataConfig) -> list[str]:
    """What keeps a data set from being used, found from its columns; nothing but its first rows is read."""
    # A stream knows no slices such as "train[:10]+test", and the columns are those of the first split.
    whole = config.model_copy(update={"split": re.split(r"[\[+]", config.split)[0]})
    try:
        _stream_columns(_load(whole, streaming=True), whole)
    except ValueError as error:
        return str(error).splitlines()
    return []


def _load(config: DataConfig, *, streaming: bool) -> Any:
    import datasets

    path = str(config.path)
    local = Path(path).expanduser()
    try:
        if local.is_dir() and any((local / name).is_file() for name in (_SAVED_ONE, _SAVED_SPLITS)):
            dataset = _split(datasets.load_from_disk(str(local)), config)
            return dataset.to_iterable_dataset() if streaming else dataset
        options: dict[str, Any] = {"split": config.split, "streaming": streaming}
        if local.is_file():
            return datasets.load_dataset(_format(local), data_files=str(local), **options)
        if local.is_dir():
            return datasets.load_dataset(str(local), name=config.subset, **options)
        if path.startswith(("/", ".", "~")) or path.count("/") > 1:
            raise FileNotFoundError("there is no such file or directory")
        return datasets.load_dataset(path, name=config.subset, revision=config.revision, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(config, error) from error


def _unreadable(config: DataConfig, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).rstrip(".")
    return ValueError(
        f"data.path={str(config.path)!r} cannot be opened as a data set ({reason}); name a data set of the Hub or a "
        "local one, or mend its files."
    )


def _split(saved: Any, config: DataConfig) -> Any:
    import datasets

    if not isinstance(saved, datasets.DatasetDict):
        return saved  # saved alone, without its split's name
    if config.split not in saved:
        raise ValueError(f"data.split={config.split!r} is not one of its splits: {', '.join(saved)}")
    return saved[config.split]


def _format(path: Path) -> str:
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path.name} is none of {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix.lower()]


def _stream_columns(dataset: IterableDataset, config: DataConfig) -> tuple[str, str]:
    from datasets.exceptions import DatasetsError

    # A bad first picture is no reason to stop. Types that are unknown, as of a CSV file, are no pictures to decode.
    rows = dataset if dataset.features is None else dataset.decode(False)
    try:
        first_row = next(iter(rows), None)
    except (OSError, ValueError, DatasetsError) as error:  # a text file is read no earlier
        raise _unreadable(config, error) from error
    if first_row is None:
        raise _no_rows(config)
    image, caption = _columns(dataset.features, list(first_row), config)
    if isinstance(first_row[image], (int, float, list)):
        raise ValueError(
            f"the column {image!r} of the data set {config.path!r} holds {type(first_row[image]).__name__} and no "
            "pictures; set data.image_column to one of pictures or their paths."
        )
    return image, caption


def _no_rows(config: DataConfig) -> ValueError:
    return ValueError(f"data.split={config.split!r} of the data set {config.path!r} has no rows; name another one.")


def _columns(features: Any, names: list[str], config: DataConfig) -> tuple[str, str]:
    """The columns of pictures and captions; raises ValueError, a line for each one missing."""
    from datasets import Image

    pictures = [name for name in names if features is not None and isinstance(features[name], Image)]
    image = config.image_column or next(iter(pictures), _IMAGE_NAME)
    caption = caption_name(names, config.caption_column)
    have = f"the data set {config.path!r} has the columns {', '.join(names)}"
    found = []
    if image not in names:
        found.append(f"there is no column {image!r} of pictures: {have}; set data.image_column to one of them.")
    if caption is None:
        wanted = config.caption_column or " or ".join(CAPTION_NAMES)
        found.append(f"there is no column {wanted} of captions: {have}; set data.caption_column to one of them.")
    if found:
        raise ValueError("\n".join(found))
    assert caption is not None
    return image, caption


def _stored(value: Any, folder: Path) -> StoredPicture:
    """A picture as it lies in a row: its bytes, a local file, or else (a remote file) the decoded picture."""
    from datasets import Image

    value = _as_entry(value)
    if not value or not (value.get("bytes") or value.get("path")):
        raise BadPicture(MISSING)
    if value.get("bytes"):
        return value["bytes"]
    if "://" not in value["path"]:
        return folder / value["path"]
    try:
        return Image().decode_example(value)
    except Exception as error:  # of the network, the archive or the decoder
        raise BadPicture(UNREADABLE) from error


def _as_entry(value: Any) -> Any:
    """A path by itself, as in a CSV file, like the entries of a column of pictures."""
    return {"path": value} if isinstance(value, str) else value


def _name(value: Any, captions: tuple[str, ...]) -> str:
    """Tells a row of a stream from others; rows of a stream have no number of their own."""
    value = value or {}
    checksum = zlib.crc32((value.get("bytes") or b"") + repr(captions).encode())
    return f"{value.get('path') or ''}#{checksum:08x}"


def _folder(config: DataConfig) -> Path:
    """Where relative paths of pictures start: where the data set is, as `load_dataset` leaves them as they stand."""
    path = Path(str(config.path)).expanduser()
    return path.parent if path.is_file() else path


def _where(config: DataConfig) -> str:
    return f"data set {config.path} ({config.split})"
