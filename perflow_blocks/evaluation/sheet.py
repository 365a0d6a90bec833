"""Labelled sheets of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 12
FONT_SIZE = 14
LEAST_WIDTH, MOST_WIDTH = 192, 512
"""Between these pixels a picture is shown as it is unless a scale is given."""
BACKGROUND, INK = "white", "black"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int | None = None,
    scale: int | None = None,
    *,
    title: str = "",
) -> Image.Image:
    """One RGB picture of all images in rows, each above its caption, which is wrapped to the image's width.

    Args:
        images: at least one; cells take the size of the largest.
        captions: one per image; line breaks are kept.
        columns: images per row; by default a sheet about as wide as high, of at most 8 columns.
        scale: whole factor of enlargement, by nearest neighbour. By default small pictures are enlarged to 192 pixels
            or more and those beyond 512 pixels are reduced.
        title: a line above the first row.

    Raises:
        ValueError: no image, captions of another number, or columns or scale below 1.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions; pass at least one, and as many of both.")
    if columns is None:
        columns = min(8, math.ceil(math.sqrt(len(images))))
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"columns={columns} or scale={scale} is below 1; pass at least 1.")
    shown = [_resized(image.convert("RGB"), scale) for image in images]
    font = ImageFont.load_default(size=FONT_SIZE)
    width = max(image.width for image in shown)
    height = max(image.height for image in shown)
    labels = [wrap(caption, font, width) for caption in captions]
    rows = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    line = _line_height(font)
    row_heights = [height + line * max(len(labels[i]) for i in row) + 2 * MARGIN for row in rows]
    heading = wrap(title, font, columns * (width + MARGIN)) if title else []
    top = MARGIN + len(heading) * line + (MARGIN if heading else 0)
    sheet = Image.new("RGB", (MARGIN + columns * (width + MARGIN), top + sum(row_heights)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), "\n".join(heading), fill=INK, font=font, spacing=line - FONT_SIZE)
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(shown[i], (left + (width - shown[i].width) // 2, top + (height - shown[i].height) // 2))
            for number, text in enumerate(labels[i]):
                draw.text((left, top + height + MARGIN // 2 + number * line), text, fill=INK, font=font)
        top += row_height
    return sheet


def wrap(text: str, font: Font, width: int) -> list[str]:
    """The lines of a text no wider than `width` pixels; a word that is too long is broken."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width and len(line) > 1:
                fits = max(1, next(n for n in range(len(line), 0, -1) if n == 1 or font.getlength(line[:n]) <= width))
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


def _line_height(font: Font) -> int:
    return math.ceil(font.getbbox("Ag|")[3]) + 4


def _resized(image: Image.Image, scale: int | None) -> Image.Image:
    if scale is None and image.width > MOST_WIDTH:
        return image.reduce(math.ceil(image.width / MOST_WIDTH))
    factor = scale or math.ceil(LEAST_WIDTH / image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
