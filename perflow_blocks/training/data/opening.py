"""From a configuration to a source of batches."""

from __future__ import annotations

from importlib.util import find_spec

from .batch import BatchSource
from .config import DataConfig, value_problems

_PACKAGES = {"datasets": "datasets", "webdataset": "webdataset"}  # by kind


def problems(config: DataConfig) -> list[str]:
    """All that is wrong with a configuration and can be found without reading pictures, one sentence each.

    That is: values, missing files and folders, unknown columns, missing captions, empty data. For a data set of the
    Hub its first rows are fetched.
    """
    found = value_problems(config)
    if found:
        return found
    package = _PACKAGES.get(config.kind)
    if package and find_spec(package) is None:
        return [f"data.kind={config.kind!r} needs the package {package}; pip install 'perflow-blocks[train]'."]
    return _data_problems(config)


def open_dataset(
    config: DataConfig, *, batch_size: int, seed: int, process_index: int = 0, num_processes: int = 1
) -> BatchSource:
    """The batches that process `process_index` of `num_processes` trains on.

    Captions and the headers of pictures are looked at first, unless the data is a stream.

    Args:
        batch_size: Rows of a batch of this process.
        seed: Settles the order, the crops, the mirroring and the captions drawn, together with the epoch.

    Raises:
        ValueError: what `problems` finds, or nothing is usable, or a number out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is too small; it must be at least 1.")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; give 0 or more.")
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index={process_index} is not below num_processes={num_processes}; count from 0.")
    found = problems(config)
    if found:
        raise ValueError("\n".join(found))
    if config.kind == "webdataset" or config.streaming:
        return _open_stream(config, batch_size, seed, process_index, num_processes)
    return _open_indexed(config, batch_size, seed, process_index, num_processes)


def _data_problems(config: DataConfig) -> list[str]:
    """What is wrong with the data of a configuration whose values are right."""
    from .folder import FolderRecords
    from .prompts import PromptRecords
    from .shards import shard_problems
    from .table import table_problems

    match config.kind:
        case "datasets":
            return table_problems(config)
        case "webdataset":
            return shard_problems(config)
        case "folder" | "prompts":
            try:
                (FolderRecords if config.kind == "folder" else PromptRecords).open(config)
            except ValueError as error:
                return [str(error)]
            return []
        case "demo":
            return []


def _open_stream(
    config: DataConfig, batch_size: int, seed: int, process_index: int, num_processes: int
) -> BatchSource:
    from .shards import ShardStream
    from .streamed import SampleStream, StreamedSource
    from .table import TableStream

    stream: SampleStream
    if config.kind == "webdataset":
        stream = ShardStream.open(config, seed=seed, process_index=process_index, num_processes=num_processes)
    else:
        stream = TableStream.open(config, seed=seed, process_index=process_index, num_processes=num_processes)
    return StreamedSource(
        stream, config, batch_size=batch_size, seed=seed, process_index=process_index, num_processes=num_processes
    )


def _open_indexed(
    config: DataConfig, batch_size: int, seed: int, process_index: int, num_processes: int
) -> BatchSource:
    from .demo import DemoRecords
    from .folder import FolderRecords
    from .indexed import IndexedSource
    from .prompts import PromptRecords
    from .records import Records
    from .table import TableRecords

    records: Records
    match config.kind:
        case "datasets":
            records = TableRecords.open(config)
        case "folder":
            records = FolderRecords.open(config)
        case "prompts":
            records = PromptRecords.open(config)
        case "demo":
            records = DemoRecords(config.max_samples, seed)
        case "webdataset":
            raise AssertionError("shards are a stream")
    return IndexedSource(
        records, config, batch_size=batch_size, seed=seed, process_index=process_index, num_processes=num_processes
    )
