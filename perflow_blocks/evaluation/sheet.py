"""Labelled sheets of images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, FONT_SIZE, LINE = 12, 14, 20
LEAST_WIDTH, MOST_WIDTH, ENLARGED_WIDTH = 192, 512, 384
"""Between the first two, in pixels, an image is shown as it is, unless a scale is given."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int | None = None,
    scale: int | None = None,
    *,
    title: str = "",
) -> Image.Image:
    """One RGB image of all images in rows, each above its caption, which is wrapped to the image's width.

    Args:
        images: at least one; cells take the size of the largest.
        captions: one per image; line breaks are kept.
        columns: images per row; by default a sheet about as wide as high, of at most 8 columns.
        scale: whole factor of enlargement, by nearest neighbour. By default images below 192 pixels are enlarged to
            384 or more, and those beyond 512 pixels are reduced.
        title: a line above the first row.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions; pass at least one, and as many of both.")
    columns = columns or min(8, math.ceil(math.sqrt(len(images))))
    shown = [_resized(image.convert("RGB"), scale) for image in images]
    font = ImageFont.load_default(size=FONT_SIZE)
    width, height = (max(sizes) for sizes in zip(*(image.size for image in shown), strict=True))
    labels = [wrap(caption, font, width) for caption in captions]
    size = (width + MARGIN, height + MARGIN + LINE * max(map(len, labels)))
    cells = [Image.new("RGB", size, "white") for _ in range(math.ceil(len(shown) / columns) * columns)]
    for cell, image, label in zip(cells, shown, labels, strict=False):
        cell.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        _write(cell, label, (0, height + MARGIN // 2), font)
    grid = make_image_grid(cells, len(cells) // columns, columns)
    heading = wrap(title, font, grid.width - MARGIN) if title else []
    sheet = ImageOps.expand(grid, (MARGIN, MARGIN + LINE * len(heading), 0, 0), "white")
    _write(sheet, heading, (MARGIN, MARGIN // 2), font)
    return sheet


def wrap(text: str, font: Font, width: int) -> list[str]:
    """The lines of a text, at most `width` pixels wide unless one character is wider; longer words are broken."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        letters = max(1, int(width * len(paragraph) / max(1.0, font.getlength(paragraph))) + 2)
        while any(font.getlength(line) > width for line in textwrap.wrap(paragraph, letters)) and letters > 1:
            letters -= 1
        lines += textwrap.wrap(paragraph, letters) or [""]
    return lines


def _write(image: Image.Image, lines: Sequence[str], place: tuple[int, int], font: Font) -> None:
    for number, text in enumerate(lines):
        ImageDraw.Draw(image).text((place[0], place[1] + LINE * number), text, fill="black", font=font)


def _resized(image: Image.Image, scale: int | None) -> Image.Image:
    if scale is None and image.width > MOST_WIDTH:
        return image.reduce(math.ceil(image.width / MOST_WIDTH))
    factor = scale or (1 if image.width >= LEAST_WIDTH else math.ceil(ENLARGED_WIDTH / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
