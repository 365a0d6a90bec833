"""From stored images to batches of one shape: opening, buckets of about one area, crops, and what SDXL's time ids say.

SDXL (arXiv 2307.01952) is told each image's original size, where its crop begins, and the size that it is trained at;
batches carry the true values, of mirrored images too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .config import DataConfig

Size = tuple[int, int]
"""(height, width) in pixels; of a position, (top, left)."""
StoredImage = bytes | Path | str | Image.Image
"""An encoded image in memory, a file, a URL, or an image that is decoded already."""


class BadSample(Exception):
    """A sample that is left out; its text is the reason, such as "missing file"."""


@dataclass(frozen=True)
class TrainingBatch:
    """Prompts, their images, and what SDXL's time ids say about each image."""

    prompts: list[str]
    pixels: Tensor | None  # (batch, 3, height, width), float32 in [-1, 1]; None where there are prompts only
    original_sizes: list[Size]  # before resizing
    crop_tops_lefts: list[Size]  # where the crops begin in the resized (and perhaps mirrored) images
    target_sizes: list[Size]  # of the crops, the same for the whole batch


def image_size(stored: StoredImage) -> Size:
    """(height, width) of an image as it is shown, from its header; raises `BadSample`."""
    with _open(stored) as image:
        size = image.height, image.width
        with suppress(Exception):  # damaged EXIF data is ignored; looking for it would decode some PNGs as a whole
            if image.format != "PNG" or "exif" in image.info:
                size = size[::-1] if image.getexif().get(ExifTags.Base.Orientation) in range(5, 9) else size
        return size


def open_image(stored: StoredImage) -> Image.Image:
    """An image as RGB, turned as its EXIF data says, transparent parts on white; raises `BadSample`."""
    image = _open(stored)
    try:
        image.load()
    except Exception as error:  # which one depends on the format and its decoder
        raise BadSample("truncated") from error
    with suppress(Exception):  # damaged EXIF data: the image as it is stored
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # greys of more than 8 bits, which Pillow clips
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise BadSample("unknown range of values")
        image = Image.fromarray((values / 257.0).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _open(stored: StoredImage) -> Image.Image:
    if isinstance(stored, Image.Image):
        return stored
    if isinstance(stored, Path) and not stored.is_file():  # opening a pipe would wait for a writer
        raise BadSample("missing file")
    try:
        file: Any = fsspec.open(stored, "rb").open() if isinstance(stored, str) else stored
        return Image.open(BytesIO(file) if isinstance(file, bytes) else file)
    except Image.DecompressionBombError as error:
        raise BadSample("too large") from error
    except Exception as error:  # Pillow's plugins raise errors of many kinds
        raise BadSample("unreadable") from error


class Buckets:
    """The sizes that images are cropped to, widest first; one square without bucketing or images."""

    def __init__(self, config: DataConfig) -> None:
        self.sizes: tuple[Size, ...] = ((config.resolution, config.resolution),)
        if config.bucketing and config.kind != "prompts":
            self.sizes = bucket_sizes(config.resolution, config.bucket_step, config.max_aspect)
        self._log_aspects = np.log([height / width for height, width in self.sizes])
        self._max_enlargement = config.max_enlargement

    def place(self, size: Size) -> tuple[int, float]:
        """The bucket whose aspect ratio is nearest to an image's, and that ratio; raises `BadSample`."""
        if min(size) < 1:
            raise BadSample("unreadable")
        aspect = size[0] / size[1]
        bucket = int(np.abs(self._log_aspects - np.log(aspect)).argmin())
        if max(wanted / own for wanted, own in zip(self.sizes[bucket], size, strict=True)) > self._max_enlargement:
            raise BadSample("too small")
        return bucket, aspect


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Sizes in multiples of `step`: for each side the longest other one within `resolution` squared pixels."""
    found = set()
    for side in range(step, int(resolution * max_aspect) + 1, step):
        other = resolution * resolution // side // step * step
        if other and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))


def plan_epoch(
    homes: NDArray[np.int64], aspects: NDArray[np.float64], group_size: int, rng: np.random.Generator
) -> list[tuple[NDArray[np.int64], int]]:
    """Groups of `group_size` samples and their buckets in random order, each sample in one group at most.

    Whole groups come from one bucket. What buckets have left over is grouped by aspect ratio, in the bucket of the
    middle one. Fewer samples than a group remain, unless they are all there are: they are then repeated. Samples are
    given by their buckets `homes` (count,) and `aspects` (count,), height over width.
    """
    groups: list[tuple[NDArray[np.int64], int]] = []
    rest = []
    for bucket in np.unique(homes):
        members = rng.permutation(np.flatnonzero(homes == bucket))
        whole = len(members) // group_size * group_size
        groups += [(group, int(bucket)) for group in members[:whole].reshape(-1, group_size)]
        rest.append(members[whole:])
    left = rng.permutation(np.concatenate(rest))
    whole = len(left) // group_size * group_size
    left = left[:whole] if groups or whole else np.resize(left, group_size)
    left = left[np.argsort(aspects[left], kind="stable")]
    groups += [(group, int(homes[group[group_size // 2]])) for group in left.reshape(-1, group_size)]
    return [groups[number] for number in rng.permutation(len(groups))]


class Sample(NamedTuple):
    """A sample before its image is decoded; `image` is None where there are prompts only."""

    captions: tuple[str, ...]
    image: StoredImage | None


def make_batch(
    read: Callable[[Any], Sample], members: Sequence[Any], target: Size, seeds: Sequence[Any], config: DataConfig
) -> tuple[TrainingBatch | None, list[str]]:
    """The batch of the samples that `read` gives for `members`, and why some are bad.

    The place of a bad sample is taken by the next good one of the batch; without a good one there is no batch.
    """
    rows, bad = [], {}
    for row, seed in enumerate(seeds):
        for place in (*range(row, len(members)), *range(row)):
            if place not in bad:
                try:
                    rows.append(make_row(read(members[place]), target, config, np.random.default_rng(seed)))
                    break
                except BadSample as error:
                    bad[place] = str(error)
    if not rows:
        return None, [*bad.values()]
    prompts, images, originals, corners = map(list, zip(*rows, strict=True))
    pixels = None if images[0] is None else VaeImageProcessor(do_resize=False).preprocess(images)
    return TrainingBatch(prompts, pixels, originals, corners, [target] * len(rows)), [*bad.values()]


def make_row(
    sample: Sample, target: Size, config: DataConfig, rng: np.random.Generator
) -> tuple[str, Image.Image | None, Size, Size]:
    """Prompt, image cropped to `target`, original size and the crop's top left; raises `BadSample`."""
    prompt = sample.captions[int(rng.integers(len(sample.captions)))]
    prompt = f"{config.trigger}, {prompt}" if config.trigger else prompt
    if sample.image is None:
        return prompt, None, target, (0, 0)
    image = open_image(sample.image)
    height, width = target
    covering = ImageOps.cover(image, (width, height), Image.Resampling.LANCZOS)
    room = covering.height - height, covering.width - width
    drawn = int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
    top, left = (room[0] // 2, room[1] // 2) if config.center_crop else drawn
    crop = covering.crop((left, top, left + width, top + height))
    if config.random_flip and rng.random() < 0.5:
        # The same pixels as a crop of the mirrored image, and that is where the time ids say they are.
        crop, left = ImageOps.mirror(crop), room[1] - left
    return prompt, crop, (image.height, image.width), (top, left)
