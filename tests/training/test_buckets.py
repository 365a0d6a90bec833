"""Images of all kinds become upright RGB, or are refused for a reason; buckets, crops and time ids are true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from perflow_blocks.training.buckets import (
    BadSample,
    Buckets,
    Sample,
    bucket_sizes,
    image_size,
    make_batch,
    make_row,
    open_image,
    plan_epoch,
)
from tests.training.conftest import encoded, noise_jpeg, small, truncated


def coordinates(height: int, width: int) -> Image.Image:
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA"])
def test_every_mode_becomes_rgb_on_white(mode: str) -> None:
    assert open_image(Image.new(mode, (4, 3))).mode == "RGB"
    if mode.endswith("A"):
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (0, 0, 0, 255))
        rgb = open_image(image.convert(mode))
        assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (0,) * 3]


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    values = np.asarray([[0, 257 * 100, 65535]], np.uint16)
    rgb = open_image(encoded(Image.fromarray(values)))
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]
    with pytest.raises(BadSample, match="range"):
        open_image(Image.fromarray(np.asarray([[0.0, 300.0]], np.float32)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_turns_the_image_and_its_size(tmp_path: Path, form: str) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[Base.Orientation] = 6  # shown turned by 90 degrees clockwise: left becomes top
    image.save(tmp_path / "a", form, exif=exif)
    assert image_size(tmp_path / "a") == (40, 20)
    column = np.asarray(open_image(tmp_path / "a"))[:, 10]
    assert len(column) == 40 and column[5].min() > 200 and column[35].max() < 50


def test_what_cannot_be_read_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stored, reason in ((b"", "unreadable"), (b"no image", "unreadable"), (tmp_path / "a.png", "missing file")):
        for function in (image_size, open_image):
            with pytest.raises(BadSample, match=reason):
                function(stored)
    assert image_size(truncated()) == (96, 96) and open_image(noise_jpeg()).size == (96, 96)
    with pytest.raises(BadSample, match="truncated"):
        open_image(truncated())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="too large"):
        image_size(encoded(Image.new("RGB", (20, 20))))


def test_sdxl_buckets_are_those_of_its_paper() -> None:
    sizes = bucket_sizes(1024, 64, 4.0)
    assert {(512, 2048), (640, 1536), (768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896)} <= set(sizes)
    assert all(0.85 * 1024**2 <= height * width <= 1024**2 for height, width in sizes)
    assert all(height % 64 == width % 64 == 0 for height, width in sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert bucket_sizes(512, 64, 1.0) == ((512, 512),)


def test_images_go_to_the_bucket_of_their_aspect_ratio_unless_too_small() -> None:
    buckets = Buckets(small("folder", "x", resolution=1024, bucket_step=64))
    shapes = {
        (1000, 1000): (1024, 1024),
        (832, 1216): (832, 1216),
        (2432, 1664): (1216, 832),
        (900, 9000): (704, 1408),
    }
    assert {size: buckets.sizes[buckets.place(size)[0]] for size in shapes} == shapes
    for size, reason in (((500, 500), "too small"), ((300, 4000), "too small"), ((0, 9), "unreadable")):
        with pytest.raises(BadSample, match=reason):
            buckets.place(size)
    assert Buckets(small("folder", "x", bucketing=False)).sizes == ((64, 64),)


def row(image: Any, target: tuple[int, int], seed: int, **settings: Any) -> Any:
    return make_row(Sample(("a",), image), target, small("folder", "x", **settings), np.random.default_rng(seed))


@pytest.mark.parametrize("center_crop", [False, True])
def test_the_time_ids_say_where_the_pixels_are(center_crop: bool) -> None:
    """At scale 1 the first pixel is the crop's top left; mirrored, that of the mirrored image."""
    seen = set()
    for seed in range(40):
        _, image, original, (top, left) = row(
            encoded(coordinates(64, 151)), (64, 100), seed, center_crop=center_crop, random_flip=True
        )
        red = np.asarray(image)[0, :, 0].astype(int)
        mirrored = red[0] > red[-1]
        assert left == (150 - red[0] if mirrored else red[0])
        assert (original, image.size, top) == ((64, 151), (100, 64), 0)
        seen.add((bool(mirrored), left))
    if center_crop:
        assert seen == {(False, 25), (True, 26)}
    else:
        assert len({left for _, left in seen}) > 10 and {mirrored for mirrored, _ in seen} == {True, False}


def test_the_crop_is_measured_in_the_resized_image() -> None:
    """An image twice as large is halved first; crops of the rows are reported in the rows of the half."""
    _, image, original, (top, left) = row(encoded(coordinates(240, 128)), (64, 64), 3)
    assert original == (240, 128) and 0 < top <= 56 and left == 0
    assert abs(np.asarray(image)[10, 32, 1] - (2 * (top + 10) + 0.5)) <= 1


def test_a_batch_is_in_minus_one_to_one_and_fills_the_places_of_bad_samples() -> None:
    samples = [Sample(("a cat",), Image.new("RGB", (64, 48), name)) for name in ("black", "white", "red")]
    samples[1] = Sample(("a cat",), truncated())
    config = small("folder", "x", trigger="sks")
    batch, bad = make_batch(lambda sample: sample, samples, (48, 64), [0, 1, 2], config)
    assert bad == ["truncated"] and batch is not None
    assert batch.pixels is not None and batch.pixels.shape == (3, 3, 48, 64)
    assert batch.pixels[:, :, 0, 0].tolist() == [[-1.0] * 3, [1.0, -1.0, -1.0], [1.0, -1.0, -1.0]]
    assert batch.prompts == ["sks, a cat"] * 3 and batch.target_sizes == [(48, 64)] * 3
    assert make_batch(lambda sample: sample, samples[1:2], (48, 64), [0], config)[0] is None


def test_an_epoch_has_each_sample_once_in_groups_of_one_bucket() -> None:
    homes = np.repeat([0, 1, 2], [9, 14, 4])
    aspects = np.linspace(0.5, 2.0, 27)
    groups = plan_epoch(homes, aspects, 4, np.random.default_rng(0))
    members = np.concatenate([group for group, _ in groups])
    assert len(groups) == 6 and len(set(members.tolist())) == 24
    pure = [(homes[group] == bucket).all() for group, bucket in groups]
    assert sum(pure) >= 6 - 1  # two of nine, two of fourteen and none of four are left over
    again = plan_epoch(homes, aspects, 4, np.random.default_rng(0))
    assert all(np.array_equal(one, other) for (one, _), (other, _) in zip(groups, again, strict=True))


def test_fewer_samples_than_a_group_are_repeated_only_if_they_are_all() -> None:
    [(group, bucket)] = plan_epoch(np.asarray([3, 3]), np.ones(2), 5, np.random.default_rng(0))
    assert bucket == 3 and sorted(set(group.tolist())) == [0, 1] and len(group) == 5
