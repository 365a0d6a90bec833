"""Pictures of all kinds become upright RGB, or are refused for a reason; buckets, crops and time ids are true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from perflow_blocks.training.data.buckets import Buckets, bucket_sizes
from perflow_blocks.training.data.cropping import Cutter, stack
from perflow_blocks.training.data.pictures import BadPicture, open_picture, picture_size, to_rgb
from tests.training.conftest import encoded, noise_jpeg, small, truncated


def coordinates(height: int, width: int) -> Image.Image:
    """A picture whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = to_rgb(Image.new(mode, (4, 3)))
    assert (image.mode, image.size) == ("RGB", (4, 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_become_white_and_opaque_ones_stay(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    rgb = to_rgb(image.convert(mode))
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_a_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([200, 0, 0])
    image.save(tmp_path / "a.png", transparency=0)
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    values = np.asarray([[0, 257 * 100, 65535]], np.uint16)
    rgb = open_picture(encoded(Image.fromarray(values)))
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_floats_from_0_to_1_are_scaled_and_others_refused() -> None:
    image = Image.fromarray(np.asarray([[0.0, 1.0]], np.float32))
    assert [to_rgb(image).getpixel((x, 0)) for x in range(2)] == [(0,) * 3, (255,) * 3]
    with pytest.raises(BadPicture, match="range"):
        to_rgb(Image.fromarray(np.asarray([[0.0, 300.0]], np.float32)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_turns_the_picture_and_its_size(tmp_path: Path, form: str) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[Base.Orientation] = 6  # shown turned by 90 degrees clockwise: left becomes top
    image.save(tmp_path / "a", form, exif=exif)
    assert picture_size(tmp_path / "a") == (40, 20)
    shown = open_picture(tmp_path / "a")
    assert shown.size == (20, 40)
    column = np.asarray(shown)[:, 10]
    assert column[5].min() > 200 and column[35].max() < 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_is_passed_over() -> None:
    image = Image.new("RGB", (40, 20))
    data = encoded(image, "JPEG")
    broken = data[:2] + b"\xff\xe1\x00\x10Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff" + data[2:]
    assert picture_size(broken) == (20, 40)
    assert open_picture(broken).size == (40, 20)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [(b"", "unreadable"), (b"no picture", "unreadable"), (Path("/nowhere/a.png"), "missing file")],
)
def test_what_has_no_header_is_refused(stored: bytes | Path, reason: str) -> None:
    for function in (picture_size, open_picture):
        with pytest.raises(BadPicture) as refused:
            function(stored)
        assert refused.value.reason == reason


def test_a_truncated_picture_has_a_size_and_no_pixels() -> None:
    assert picture_size(truncated()) == (96, 96)
    with pytest.raises(BadPicture, match="truncated"):
        open_picture(truncated())
    assert open_picture(noise_jpeg()).size == (96, 96)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF"])
def test_other_formats_cut_short_are_refused(form: str) -> None:
    data = encoded(coordinates(64, 64), form)
    with pytest.raises(BadPicture, match="truncated"):
        open_picture(data[: len(data) // 2])


def test_a_picture_too_large_for_pillow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadPicture, match="too large"):
        picture_size(encoded(Image.new("RGB", (20, 20))))


def test_sdxl_buckets_are_those_of_its_paper() -> None:
    sizes = bucket_sizes(1024, 64, 4.0)
    assert {(512, 2048), (640, 1536), (768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896)} <= set(sizes)
    assert all(0.85 * 1024**2 <= height * width <= 1024**2 for height, width in sizes)
    assert all(height % 64 == width % 64 == 0 for height, width in sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"), [(64, 64, 2.0), (64, 8, 2.0), (512, 64, 1.0), (768, 32, 3.0)]
)
def test_buckets_hold_the_square_and_keep_their_limits(resolution: int, step: int, aspect: float) -> None:
    sizes = bucket_sizes(resolution, step, aspect)
    assert (resolution, resolution) in sizes
    assert all(max(size) <= aspect * min(size) for size in sizes)


def test_pictures_go_to_the_bucket_of_their_aspect_ratio() -> None:
    buckets = Buckets(sizes=bucket_sizes(1024, 64, 2.0))
    shapes = np.asarray([(1000, 1000), (832, 1216), (2432, 1664), (10, 4000), (4000, 10)])
    sizes = [buckets.sizes[home] for home in buckets.nearest(shapes)]
    assert sizes[:3] == [(1024, 1024), (832, 1216), (1216, 832)]
    assert sizes[3] == buckets.sizes[0] and sizes[4] == buckets.sizes[-1]
    assert sizes[3][1] / sizes[3][0] == max(width / height for height, width in buckets.sizes)


def test_without_buckets_there_is_one_square() -> None:
    assert Buckets.of(small("folder", "x", bucketing=False)).sizes == ((64, 64),)
    assert len(Buckets.of(small("folder", "x")).sizes) > 1


@pytest.mark.parametrize("center_crop", [False, True])
def test_the_time_ids_say_where_the_pixels_are(center_crop: bool) -> None:
    """At scale 1 the first pixel is the crop's top left; mirrored, that of the mirrored picture."""
    cutter = Cutter(trigger="", center_crop=center_crop, random_flip=True)
    seen = set()
    for seed in range(40):
        view = cutter.view(["a"], encoded(coordinates(64, 151)), (64, 100), np.random.default_rng(seed))
        assert view.picture is not None
        red = np.asarray(view.picture)[0, :, 0].astype(int)
        mirrored = red[0] > red[-1]
        top, left = view.crop_top_left
        assert left == (150 - red[0] if mirrored else red[0])
        assert (view.original_size, view.target_size, top) == ((64, 151), (64, 100), 0)
        seen.add((bool(mirrored), left))
    if center_crop:
        assert seen == {(False, 25), (True, 26)}
    else:
        assert len({left for _, left in seen}) > 10 and {mirrored for mirrored, _ in seen} == {True, False}


def test_the_crop_is_measured_in_the_resized_picture() -> None:
    """A picture twice as large is halved first; crops of the rows are reported in the rows of the half."""
    cutter = Cutter(trigger="", center_crop=False, random_flip=False)
    view = cutter.view(["a"], encoded(coordinates(240, 128)), (64, 64), np.random.default_rng(3))
    assert view.picture is not None and view.original_size == (240, 128)
    top, left = view.crop_top_left
    assert 0 < top <= 56 and left == 0
    assert abs(np.asarray(view.picture)[10, 32, 1] - (2 * (top + 10) + 0.5)) <= 1


def test_a_batch_is_in_minus_one_to_one() -> None:
    cutter = Cutter(trigger="sks", center_crop=True, random_flip=False)
    rng = np.random.default_rng(0)
    images = [Image.new("RGB", (64, 48), color) for color in ("black", "white", "red")]
    batch = stack([cutter.view(["a cat"], image, (48, 64), rng) for image in images])
    assert batch.pixels is not None and batch.pixels.shape == (3, 3, 48, 64)
    assert batch.pixels[0].unique().tolist() == [-1.0] and batch.pixels[1].unique().tolist() == [1.0]
    assert batch.pixels[2, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert batch.prompts == ["sks, a cat"] * 3
