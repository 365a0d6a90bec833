"""The picture of a model card."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

PICTURE = "picture.png"
MAX_BYTES = 1_000_000


def require_picture(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"picture {path} cannot be read ({error}); pass a picture file, a PNG say.") from error


def save_picture(path: str | os.PathLike[str], target: Path) -> None:
    """Writes a PNG of at most 1 MB, smaller by steps until it is, and without what the file tells beside the picture.

    Programs write prompts and paths of models there, which are nobody else's business.
    """
    with Image.open(path) as image:
        picture = image.convert("RGB")
    data = _png(picture)
    while len(data) > MAX_BYTES:
        width, height = (max(1, round(side * 0.8)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        data = _png(picture)
    target.write_bytes(data)


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
