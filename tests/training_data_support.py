"""Small data sets for the tests of the trainer's data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from perflow_blocks.training.data import BatchSource, DataConfig, TrainingBatch

SHAPES = [(96, 96), (64, 128), (128, 64), (96, 80), (80, 96), (100, 130)]
"""(height, width) of pictures in turn."""


def picture(number: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A picture of one colour that tells its number."""
    return Image.new("RGB", (size[1], size[0]), (number % 256, number // 256, 128))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def noise_jpeg(size: tuple[int, int] = (96, 96)) -> bytes:
    """A JPEG file large enough to be cut short in the middle of its data."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def truncated() -> bytes:
    data = noise_jpeg()
    return data[: len(data) // 2]


def make_folder(root: Path, count: int = 24, *, captions: str = "metadata.jsonl") -> Path:
    """Numbered pictures of several shapes, captioned "number 7", in a JSON Lines file or (".txt") beside them."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        (root / f"{number:03}.png").write_bytes(encoded(picture(number, SHAPES[number % len(SHAPES)])))
        if captions == ".txt":
            (root / f"{number:03}.txt").write_text(f"number {number}\n")
        lines.append({"file_name": f"{number:03}.png", "text": f"number {number}"})
    if captions != ".txt":
        write_lines(root / captions, lines)
    return root


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_shards(root: Path, *, shards: int = 4, per_shard: int = 6) -> str:
    """webdataset shards of pictures as in `make_folder`; the brace range that names them."""
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        write_shard(
            root / f"s-{shard:02}.tar",
            [
                (f"{number:03}.{form}", data)
                for number in numbers
                for form, data in (
                    ("png", encoded(picture(number, SHAPES[number % len(SHAPES)]))),
                    ("txt", f"number {number}".encode()),
                )
            ],
        )
    return str(root / f"s-{{00..{shards - 1:02}}}.tar")


def write_shard(path: Path, files: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def small(kind: str, path: object = None, **changes: object) -> DataConfig:
    """A configuration for the pictures above: resolution 64 in steps of 16."""
    values = {"resolution": 64, "bucket_step": 16, "path": None if path is None else str(path)}
    return DataConfig(kind=kind, **{**values, **changes})  # type: ignore[arg-type]


def take(source: BatchSource, count: int) -> list[TrainingBatch]:
    return list(islice(source, count))


def numbers(batches: Iterable[TrainingBatch]) -> list[int]:
    """The numbers in the captions of the batches."""
    return [int(prompt.split()[-1]) for batch in batches for prompt in batch.prompts]


def assert_same(first: Sequence[TrainingBatch], second: Sequence[TrainingBatch]) -> None:
    """Equal batches in equal order, pixels to the bit."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.prompts == other.prompts
        assert one.original_sizes == other.original_sizes
        assert one.crop_tops_lefts == other.crop_tops_lefts
        assert one.target_sizes == other.target_sizes
        if one.pixels is None or other.pixels is None:
            assert one.pixels is other.pixels
        else:
            assert torch.equal(one.pixels, other.pixels)
