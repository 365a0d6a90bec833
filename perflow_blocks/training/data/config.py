"""What to train on: the `data` section of a trainer's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["datasets", "folder", "webdataset", "prompts", "demo"]

DEMO_PICTURE_SIZE = 64
CAPTION_NAMES = ("text", "caption", "prompt")
"""Where captions are looked for, in this order, if `caption_column` does not say it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set and how its pictures are cut. `value_problems` checks all values at once."""

    kind: Kind = "prompts"
    """"datasets": a Hugging Face data set. "folder": pictures with captions in metadata.jsonl, captions.jsonl or .txt
    files beside them. "webdataset": tar shards. "prompts": captions without pictures. "demo": the demo's drawings."""

    path: str | None = None
    """Hub id, directory or file. For webdataset shards a directory, a tar file, a brace range such as
    "shards-{000..099}.tar", or a URL of these ("pipe:" URLs run the command they name)."""

    subset: str | None = None
    """Name of the configuration, for data sets on the Hub that have several."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    split: str = "train"
    """Split of a data set, with slices where it is not streamed, such as "train[:1000]"."""
    streaming: bool = False
    """Reads a data set of the Hub while training instead of downloading it first."""

    image_column: str | None = None
    """Column (webdataset: extension) of the pictures; None takes the first one that holds pictures.
    Of paths in it, as in a CSV file, relative ones start at the folder that `path` is or lies in."""
    caption_column: str | None = None
    """Column (JSON: key; webdataset: extension, or key of the .json) of the captions: each a string, or a list of
    which one is drawn. None takes the first of "text", "caption" and "prompt" (webdataset: after the .txt)."""
    trigger: str = ""
    """Words put before every caption, with a comma between."""

    resolution: int = 1024
    """Side in pixels of a square picture; buckets have about its area."""
    bucketing: bool = True
    """Whether pictures keep about their aspect ratio; otherwise all are cut to squares."""
    bucket_step: int = 64
    """Heights and widths of buckets are multiples of this many pixels."""
    max_aspect: float = 2.0
    """Longest side over shortest side of a bucket, at most. Pictures beyond are cut to it."""
    max_enlargement: float = 1.5
    """A picture that has to grow by more than this factor to cover its bucket counts as too small."""
    center_crop: bool = False
    """Cuts the middle out of a picture instead of a place drawn at random."""
    random_flip: bool = False
    """Mirrors half of the pictures."""

    max_samples: int | None = None
    """Only the first so many; for the demo how many pictures are drawn (None: 10,000)."""
    shuffle_buffer: int = 1000
    """Samples held in memory to shuffle those that are read one after the other (webdataset, streaming)."""
    num_workers: int = 0
    """Processes that decode pictures, per training process; the batches do not depend on it."""


def value_problems(config: DataConfig) -> list[str]:
    """What is wrong with the values alone, one sentence each; nothing is opened."""
    if config.kind not in get_args(Kind):
        return [f"data.kind={config.kind!r} is not one of {', '.join(get_args(Kind))}."]
    return [*_source_problems(config), *_number_problems(config), *_size_problems(config)]


def _source_problems(config: DataConfig) -> list[str]:
    found = []
    if config.kind == "demo" and config.path is not None:
        found.append(f"data.path={config.path!r} means nothing to data.kind='demo'; leave it out.")
    if config.kind != "demo" and not config.path:
        found.append(f"data.path is not set, and data.kind={config.kind!r} needs it; say where the data is.")
    if config.streaming and config.kind != "datasets":
        found.append(f"data.streaming=true goes with data.kind='datasets', not {config.kind!r}; leave it out.")
    if config.streaming and "[" in config.split:
        found.append(f"data.split={config.split!r} is a slice, which a stream does not have; use data.max_samples.")
    return found


def _number_problems(config: DataConfig) -> list[str]:
    least: dict[str, float] = {
        "resolution": 8,
        "bucket_step": 8,
        "max_aspect": 1,
        "max_enlargement": 1,
        "max_samples": 1,
        "shuffle_buffer": 1,
        "num_workers": 0,
    }
    values = {name: getattr(config, name) for name in least}
    return [
        f"data.{name}={value} is too small; it must be at least {least[name]}."
        for name, value in values.items()
        if value is not None and not value >= least[name]
    ]


def _size_problems(config: DataConfig) -> list[str]:
    found = []
    multiple = config.bucket_step if config.bucketing and config.kind != "prompts" else 8
    if multiple >= 8 and config.resolution % multiple:
        below = max(multiple, config.resolution // multiple * multiple)
        name = "data.bucket_step=" if multiple == config.bucket_step else ""
        found.append(f"data.resolution={config.resolution} is no multiple of {name}{multiple}; use {below}.")
    largest = DEMO_PICTURE_SIZE * config.max_enlargement
    if config.kind == "demo" and config.resolution > largest:
        found.append(
            f"data.resolution={config.resolution} is too large for the demo's pictures, which have "
            f"{DEMO_PICTURE_SIZE} pixels; use {DEMO_PICTURE_SIZE}."
        )
    return found
