"""Contact sheets: every image is on it, enlarged without blurring, over a caption that fits."""

from __future__ import annotations

import pytest
from PIL import Image, ImageFont

from perflow_blocks.evaluation.sheet import contact_sheet, wrap

COLOURS = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def images(size: int = 8) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), colour) for colour in COLOURS]


def count(sheet: Image.Image, colour: tuple[int, ...]) -> int:
    colours = sheet.getcolors(1 << 20)
    assert colours is not None
    return dict((found, number) for number, found in colours).get(colour, 0)


def test_every_picture_is_shown_whole_at_its_scale() -> None:
    sheet = contact_sheet(images(), ["", "", ""], columns=2, scale=10)
    assert [count(sheet, colour) for colour in COLOURS] == [6400] * 3
    assert {colour for _, colour in sheet.getcolors(16) or ()} == {*COLOURS, (255, 255, 255)}


def test_rows_run_left_to_right_then_down() -> None:
    sheet = contact_sheet(images(), ["", "", ""], columns=2, scale=10)
    places = [(x, y) for y in range(sheet.height) for x in range(sheet.width)]
    corners = [next(place for place in places if sheet.getpixel(place) == colour) for colour in COLOURS]
    (red_x, red_y), (green_x, green_y), (blue_x, blue_y) = corners
    assert red_y == green_y < blue_y
    assert red_x == blue_x < green_x


def test_pixels_stay_sharp_and_sizes_are_chosen() -> None:
    board = Image.new("RGB", (2, 1), (255, 0, 0))
    board.putpixel((1, 0), (0, 0, 255))
    sheet = contact_sheet([board], [""])
    assert count(sheet, (255, 0, 0)) == count(sheet, (0, 0, 255)) == 192 * 192
    assert contact_sheet([Image.new("RGB", (300, 300))], [""]).width < 340
    assert contact_sheet([Image.new("RGB", (2048, 2048))], [""]).width < 560


def test_captions_and_title_are_written_and_make_room() -> None:
    bare = contact_sheet(images(), ["", "", ""], columns=3)
    labelled = contact_sheet(images(), ["a", "two\nlines", "c"], columns=3, title="Title")
    assert labelled.width == bare.width and labelled.height > bare.height + 30
    assert count(labelled, (0, 0, 0)) > 0 == count(bare, (0, 0, 0))


def test_text_is_wrapped_to_the_width_and_nothing_is_lost() -> None:
    font = ImageFont.load_default(size=14)
    text = "a rather long caption with an_unbreakably_long_word_in_the_middle of it\nand a second line"
    lines = wrap(text, font, 90)
    assert max(font.getlength(line) for line in lines) <= 90
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert len(lines) > 5
    assert wrap("", font, 90) == [""]
    assert wrap("wide", font, 1) == list("wide")
    assert "".join(wrap("n" * 10_000, font, 90)) == "n" * 10_000  # without taking minutes


@pytest.mark.parametrize("captions", [[], ["one"]])
def test_images_and_captions_must_be_as_many(captions: list[str]) -> None:
    with pytest.raises(ValueError, match="pass at least"):
        contact_sheet(images() if captions else [], captions)
