"""The picture of a model card."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError

PICTURE = "picture.png"
MAX_SIDE = 1024


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
    """Writes a PNG of at most 1024 pixels a side, without the prompts and paths that programs write into pictures."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.save(target, "PNG")
